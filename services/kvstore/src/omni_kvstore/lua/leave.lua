-- End an epoch's membership at once, if it is in force. ARGV: worker, epoch, max_events.
if redis.call('HGET', worker_key(ARGV[1]), 'epoch') == ARGV[2] then
  end_worker(ARGV[1], ARGV[3])
end
