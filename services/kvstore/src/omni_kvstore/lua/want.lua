-- Ask an epoch for a snapshot at its next heartbeat. ARGV: worker, epoch. Returns 1 if it is in force.
if redis.call('HGET', worker_key(ARGV[1]), 'epoch') ~= ARGV[2] then
  return 0
end
redis.call('HSET', worker_key(ARGV[1]), 'gap', 1)
return 1
