-- Every worker, at one point of the event stream. ARGV: schema this kvstore speaks, a name for this data set, taken
-- if it has none. A Redis that restarted may have lost its last second: the data set gets a new name then, and every
-- worker is asked for a snapshot.
-- Returns {schema found, data set, last event number, entries,
--          {worker, epoch, info, model, block_size, draining, pool_medium, sequence, gap, blocks, lease_ms left} ...}.
local found = redis.call('GET', prefix .. ':schema')
if not found and redis.call('EXISTS', prefix .. ':dataset') == 1 then
  found = '1'
end
if found and found ~= ARGV[1] then
  return {found, '', '0', 0, {}}
end
redis.call('SET', prefix .. ':schema', ARGV[1])

local server = string.match(redis.call('INFO', 'server'), 'run_id:(%x+)')
local dataset = redis.call('HMGET', prefix .. ':data', 'name', 'server')
local is_restarted = dataset[2] ~= server
if is_restarted then
  dataset[1] = ARGV[2]
  redis.call('HSET', prefix .. ':data', 'name', ARGV[2], 'server', server)
end

local entries, workers, now = 0, {}, now_ms()
local leases = redis.call('ZRANGE', prefix .. ':leases', 0, -1, 'WITHSCORES')
for i = 1, #leases, 2 do
  local worker, ends = leases[i], tonumber(leases[i + 1])
  local name = worker_key(worker)
  if is_restarted and redis.call('EXISTS', name) == 1 then
    redis.call('HSET', name, 'gap', 1)
  end
  local f = redis.call('HMGET', name, 'epoch', 'info', 'model', 'block_size', 'draining', 'pool_medium', 'sequence',
    'gap', 'run')
  if f[1] then
    local blocks = redis.call('ZCARD', held_key(f[9]))
    workers[#workers + 1] = {worker, f[1], f[2], f[3], f[4], f[5], f[6], f[7], f[8], blocks, math.floor(ends - now)}
    entries = entries + blocks
  end
end
for _, run in ipairs(redis.call('HKEYS', prefix .. ':trash')) do
  entries = entries + redis.call('ZCARD', held_key(run))
end
redis.call('SET', prefix .. ':entries', int(entries))
return {ARGV[1], dataset[1], redis.call('GET', prefix .. ':event') or '0', entries, workers}
