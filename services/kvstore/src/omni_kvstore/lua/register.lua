-- Take or renew a lease. ARGV: worker, epoch, info, model, block_size, draining, pool_medium (0: not a pool), lease_ms,
-- refresh_ms, max_events. Returns {accepted, epoch in force, wants_snapshot}.
local worker, epoch, info, model, block_size, draining = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5], ARGV[6]
local pool_medium = ARGV[7]
local lease_ms, refresh_ms, max_events = tonumber(ARGV[8]), tonumber(ARGV[9]), ARGV[10]
local name = worker_key(worker)
local known = redis.call('HMGET', name, 'epoch', 'info', 'draining', 'sequence', 'gap', 'complete_ms')
local sequence, gap, complete_ms = known[4], known[5], known[6]

if known[1] and tonumber(known[1]) > tonumber(epoch) then
  return {0, known[1], 0}
end
if known[1] and tonumber(known[1]) < tonumber(epoch) then
  end_worker(worker, max_events)
  known = {}
end

local function namespace_number()
  local namespaces, namespace = prefix .. ':namespaces', block_size .. '/' .. model
  local number = redis.call('HGET', namespaces, namespace)
  if not number then
    number = int(redis.call('HLEN', namespaces) + 1)
    redis.call('HSET', namespaces, namespace, number)
  end
  return number
end

local is_new = not known[1]
if is_new then
  sequence, gap, complete_ms = '0', '0', '0'
  local namespace = namespace_number()
  redis.call('HSET', name, 'epoch', epoch, 'run', new_run(worker), 'sequence', 0, 'gap', 0, 'complete_ms', 0,
    'namespace', namespace, 'model', model, 'block_size', block_size, 'pool_medium', pool_medium)
  if pool_medium ~= '0' then
    redis.call('SADD', pools_key(namespace), worker)
  end
end
if is_new or known[2] ~= info or known[3] ~= draining then
  redis.call('HSET', name, 'info', info, 'draining', draining)
  emit(max_events, 'kind', 'joined', 'worker', worker, 'epoch', epoch, 'info', info, 'model', model,
    'block_size', block_size, 'draining', draining, 'pool_medium', pool_medium)
end

local now = now_ms()
redis.call('ZADD', prefix .. ':leases', int(now + lease_ms), worker)
local wants = sequence == '0' or gap == '1' or now - tonumber(complete_ms) > refresh_ms
return {1, epoch, wants and 1 or 0}
