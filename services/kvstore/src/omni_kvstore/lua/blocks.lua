-- A page of a worker's blocks. ARGV: worker, run (the first page: ''), cursor, count.
-- Returns {epoch or 0, run, next cursor, blocks}; a block is 16 bytes key, 4 bytes position, 1 byte media.
local fields = redis.call('HMGET', worker_key(ARGV[1]), 'epoch', 'run', 'namespace')
local run = fields[2]
if not run or (ARGV[2] ~= '' and ARGV[2] ~= run) then
  -- Gone or replaced meanwhile; the events that say so follow.
  return {0, '', '0', ''}
end
local page = redis.call('ZSCAN', held_key(run), ARGV[3], 'COUNT', ARGV[4])
local spans, order = {}, {}
for i = 1, #page[2], 2 do
  local span = string.sub(page[2][i], 1, KEY_BYTES)
  if not spans[span] then
    spans[span] = { blocks = {}, positions = {} }
    order[#order + 1] = span
  end
  local found = spans[span]
  found.blocks[#found.blocks + 1] = string.sub(page[2][i], KEY_BYTES + 1)
  found.positions[#found.positions + 1] = tonumber(page[2][i + 1])
end
local packed_run, result = struct.pack('>I4', run), {}
for _, span in ipairs(order) do
  local blocks, positions = spans[span].blocks, spans[span].positions
  each_chunk(blocks, function(first, last)
    local values = redis.call('HMGET', span_key(fields[3], span), unpack(blocks, first, last))
    for i = first, last do
      local holders = values[i - first + 1]
      local at = holders and find_run(holders, packed_run)
      if at then
        result[#result + 1] = blocks[i] .. struct.pack('>I4B', positions[i], string.byte(holders, at + 4))
      end
    end
  end)
end
return {fields[1], run, page[1], table.concat(result)}
