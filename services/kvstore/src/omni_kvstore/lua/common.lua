-- Prepended to every script. KEYS[1] is the prefix "omni:{cluster}"; its hash tag keeps all keys in one slot.
-- Key names and their meaning are in schema.py.
local prefix = KEYS[1]
local KEY_BYTES, HOLDER_BYTES = 16, 5
-- Variadic calls go in chunks: Lua's stack bounds the arguments of one call.
local CHUNK = 1000

local function int(number)
  return string.format('%.0f', number)
end

local function now_ms()
  local time = redis.call('TIME')
  return tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
end

local function worker_key(worker)
  return prefix .. ':worker:' .. worker
end

local function span_key(namespace, span)
  return prefix .. ':span:' .. namespace .. ':' .. span
end

local function held_key(run)
  return prefix .. ':held:' .. run
end

local function pools_key(namespace)
  return prefix .. ':pools:' .. namespace
end

local function split(keys)
  local blocks = {}
  for first = 1, #keys, KEY_BYTES do
    blocks[#blocks + 1] = string.sub(keys, first, first + KEY_BYTES - 1)
  end
  return blocks
end

local function each_chunk(list, apply)
  for first = 1, #list, CHUNK do
    apply(first, math.min(first + CHUNK - 1, #list))
  end
end

local function call_in_chunks(command, key, list)
  each_chunk(list, function(first, last)
    redis.call(command, key, unpack(list, first, last))
  end)
end

-- Events are numbered without gaps, so a reader sees a loss.
local function emit(max_events, ...)
  local number = redis.call('INCR', prefix .. ':event')
  redis.call('XADD', prefix .. ':events', 'MAXLEN', '~', max_events, int(number) .. '-0', ...)
end

local function add_entries(count)
  if count ~= 0 then
    redis.call('INCRBY', prefix .. ':entries', int(count))
  end
end

local function new_run(worker)
  local run = int(redis.call('INCR', prefix .. ':run'))
  redis.call('HSET', prefix .. ':runs', run, worker)
  return run
end

-- The run's entries count no more from here on; sweep.lua removes them piecewise.
local function retire_run(run, namespace)
  redis.call('HDEL', prefix .. ':runs', run)
  redis.call('HSET', prefix .. ':trash', run, namespace)
end

local function end_worker(worker, max_events)
  local fields = redis.call('HMGET', worker_key(worker), 'epoch', 'run', 'namespace', 'model')
  redis.call('ZREM', prefix .. ':leases', worker)
  if fields[1] then
    retire_run(fields[2], fields[3])
    redis.call('SREM', pools_key(fields[3]), worker)
    redis.call('DEL', worker_key(worker))
    emit(max_events, 'kind', 'left', 'worker', worker, 'epoch', fields[1], 'model', fields[4])
  end
end

-- Where the run stands in a packed list of holders (run, media; 4 + 1 bytes each); nil if it does not.
local function find_run(holders, packed_run)
  local from = 1
  while true do
    local at = string.find(holders, packed_run, from, true)
    if not at or (at - 1) % HOLDER_BYTES == 0 then
      return at
    end
    from = at + 1
  end
end

-- Take media (a bit mask) of the run away from blocks of one span. Returns the blocks the run holds no more.
local function strip(namespace, span, blocks, run, mask)
  local name, packed_run, gone = span_key(namespace, span), struct.pack('>I4', run), {}
  local kept, empty = {}, {}
  each_chunk(blocks, function(first, last)
    local values = redis.call('HMGET', name, unpack(blocks, first, last))
    for i = first, last do
      local holders = values[i - first + 1]
      local at = holders and find_run(holders, packed_run)
      if at then
        local media = string.byte(holders, at + 4)
        local left = bit.band(media, bit.bnot(mask))
        local tail = string.sub(holders, at + HOLDER_BYTES)
        if left == 0 then
          holders = string.sub(holders, 1, at - 1) .. tail
          gone[#gone + 1] = blocks[i]
        elseif left ~= media then
          holders = string.sub(holders, 1, at + 3) .. string.char(left) .. tail
        end
        if #holders == 0 then
          empty[#empty + 1] = blocks[i]
        elseif left ~= media then
          kept[#kept + 1] = blocks[i]
          kept[#kept + 1] = holders
        end
      end
    end
  end)
  call_in_chunks('HSET', name, kept)
  call_in_chunks('HDEL', name, empty)
  return gone
end

-- Remove a run's deepest entries, so that no prefix goes before its tail. Returns their keys, joined piecewise.
local function pop_deepest(namespace, run, count)
  local popped = redis.call('ZPOPMAX', held_key(run), int(count))
  local spans, order = {}, {}
  for i = 1, #popped, 2 do
    local span = string.sub(popped[i], 1, KEY_BYTES)
    if not spans[span] then
      spans[span] = {}
      order[#order + 1] = span
    end
    local blocks = spans[span]
    blocks[#blocks + 1] = string.sub(popped[i], KEY_BYTES + 1)
  end
  local removed = {}
  for _, span in ipairs(order) do
    strip(namespace, span, spans[span], run, 255)
    removed[#removed + 1] = table.concat(spans[span])
  end
  add_entries(-#popped / 2)
  return removed, #popped / 2
end
