-- Ask an epoch, if it is in force, for a snapshot at its next heartbeat. ARGV: worker, epoch.
if redis.call('HGET', worker_key(ARGV[1]), 'epoch') == ARGV[2] then
  redis.call('HSET', worker_key(ARGV[1]), 'gap', 1)
end
