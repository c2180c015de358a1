-- Every worker, at one point of the event stream. ARGV: a name for this data set, taken if it has none.
-- Returns {data set, last event number, entries, {worker, epoch, info, model, block_size, draining} ...}.
redis.call('SET', prefix .. ':dataset', ARGV[1], 'NX')
local entries, workers = 0, {}
for _, worker in ipairs(redis.call('ZRANGE', prefix .. ':leases', 0, -1)) do
  local fields = redis.call('HMGET', worker_key(worker), 'epoch', 'info', 'model', 'block_size', 'draining', 'run')
  if fields[1] then
    workers[#workers + 1] = {worker, fields[1], fields[2], fields[3], fields[4], fields[5]}
    for medium = 0, 7 do
      entries = entries + redis.call('SCARD', held_key(holder_of(fields[6], medium)))
    end
  end
end
return {redis.call('GET', prefix .. ':dataset'), redis.call('GET', prefix .. ':event') or '0', entries, workers}
