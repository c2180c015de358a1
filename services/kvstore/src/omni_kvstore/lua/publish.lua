-- Apply one part of a batch. ARGV: worker, epoch, sequence, replaces (the part opens a snapshot), commits (the part
-- is the batch's last), completes (the batch is a snapshot), ttl_ms, max_events, then (action, medium, keys) each.
-- Returns {outcome, last committed sequence or epoch in force}.
local KEY_BYTES, CHUNK = 16, 1000
local worker, epoch, sequence = ARGV[1], ARGV[2], tonumber(ARGV[3])
local replaces, commits, completes = ARGV[4] == '1', ARGV[5] == '1', ARGV[6] == '1'
local ttl_ms, max_events = ARGV[7], ARGV[8]
local name = worker_key(worker)
local known = redis.call('HMGET', name, 'epoch', 'run', 'sequence')
local run = known[2]

local function clear()
  retire_run(run)
  run = new_run(worker)
  redis.call('HSET', name, 'run', run)
  emit(max_events, 'kind', 'cleared', 'worker', worker, 'epoch', epoch, 'medium', 0, 'keys', '')
end

-- Variadic in chunks: Lua's stack bounds the arguments of one call.
local function change_held(command, holder, blocks)
  for first = 1, #blocks, CHUNK do
    redis.call(command, held_key(holder), unpack(blocks, first, math.min(first + CHUNK - 1, #blocks)))
  end
end

local function split(keys)
  local blocks = {}
  for first = 1, #keys, KEY_BYTES do
    blocks[#blocks + 1] = string.sub(keys, first, first + KEY_BYTES - 1)
  end
  return blocks
end

local function store(holder, blocks)
  change_held('SADD', holder, blocks)
  redis.call('PEXPIRE', held_key(holder), ttl_ms)
  for _, block in ipairs(blocks) do
    redis.call('SADD', block_key(block), holder)
    redis.call('PEXPIRE', block_key(block), ttl_ms)
  end
end

local function remove(holder, blocks)
  change_held('SREM', holder, blocks)
  for _, block in ipairs(blocks) do
    redis.call('SREM', block_key(block), holder)
  end
end

if not known[1] then
  return {'unknown', 0}
end
if known[1] ~= epoch then
  return {tonumber(known[1]) > tonumber(epoch) and 'stale' or 'unknown', known[1]}
end
if replaces then
  clear()
  -- Until the last part commits, any other sequence than this one is a gap.
  redis.call('HSET', name, 'sequence', int(sequence - 1), 'gap', 1)
elseif sequence <= tonumber(known[3]) then
  return {'ok', known[3]}
elseif sequence ~= tonumber(known[3]) + 1 then
  redis.call('HSET', name, 'gap', 1)
  return {'gap', known[3]}
end

for i = 9, #ARGV, 3 do
  local action, medium, keys = ARGV[i], ARGV[i + 1], ARGV[i + 2]
  if action == 'cleared' then
    clear()
  elseif #keys > 0 then
    local apply = action == 'stored' and store or remove
    apply(holder_of(run, medium), split(keys))
    emit(max_events, 'kind', action, 'worker', worker, 'epoch', epoch, 'medium', medium, 'keys', keys)
  end
end

if commits then
  redis.call('HSET', name, 'sequence', int(sequence))
  if completes then
    redis.call('HSET', name, 'gap', 0)
  end
  if completes or sequence == 1 then
    redis.call('HSET', name, 'complete_ms', int(now_ms()))
  end
end
return {'ok', commits and int(sequence) or int(sequence - 1)}
