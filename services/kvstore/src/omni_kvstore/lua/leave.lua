-- End an epoch's membership at once. ARGV: worker, epoch, max_events. Returns 1 if it was in force.
if redis.call('HGET', worker_key(ARGV[1]), 'epoch') ~= ARGV[2] then
  return 0
end
end_worker(ARGV[1], ARGV[3])
return 1
