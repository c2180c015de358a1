-- Prepended to every script. KEYS[1] is the prefix "omni:{cluster}"; its hash tag keeps all keys in one slot.
-- Key names and their meaning are in schema.py.
local prefix = KEYS[1]

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

local function block_key(block)
  return prefix .. ':block:' .. block
end

local function holder_of(run, medium)
  return int(tonumber(run) * 8 + tonumber(medium))
end

local function held_key(holder)
  return prefix .. ':held:' .. holder
end

-- Events are numbered without gaps, so a reader sees a loss.
local function emit(max_events, ...)
  local number = redis.call('INCR', prefix .. ':event')
  redis.call('XADD', prefix .. ':events', 'MAXLEN', '~', max_events, int(number) .. '-0', ...)
end

local function new_run(worker)
  local run = int(redis.call('INCR', prefix .. ':run'))
  redis.call('HSET', prefix .. ':runs', run, worker)
  return run
end

-- The run's entries count no more from here on; sweep.lua removes them piecewise.
local function retire_run(run)
  redis.call('HDEL', prefix .. ':runs', run)
  redis.call('SADD', prefix .. ':trash', run)
end

local function end_worker(worker, max_events)
  local fields = redis.call('HMGET', worker_key(worker), 'epoch', 'run')
  redis.call('ZREM', prefix .. ':leases', worker)
  if fields[1] then
    retire_run(fields[2])
    redis.call('DEL', worker_key(worker))
    emit(max_events, 'kind', 'left', 'worker', worker, 'epoch', fields[1])
  end
end
