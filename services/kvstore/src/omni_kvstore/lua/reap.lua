-- End memberships whose lease is over. ARGV: lease_ms, max_events.
-- Where nobody has reaped for half a lease, heartbeats could not arrive either: every lease then gets a full term.
-- Returns {ended, runs waiting for sweep, leases left}.
local lease_ms, max_events = tonumber(ARGV[1]), ARGV[2]
local leases = prefix .. ':leases'
local now = now_ms()
local last = tonumber(redis.call('GET', prefix .. ':reaped') or '0')
redis.call('SET', prefix .. ':reaped', int(now))

local ended = 0
if now - last > lease_ms / 2 then
  for _, worker in ipairs(redis.call('ZRANGEBYSCORE', leases, '-inf', int(now + lease_ms))) do
    redis.call('ZADD', leases, int(now + lease_ms), worker)
  end
else
  for _, worker in ipairs(redis.call('ZRANGEBYSCORE', leases, '-inf', int(now))) do
    end_worker(worker, max_events)
    ended = ended + 1
  end
end
return {ended, redis.call('HLEN', prefix .. ':trash'), redis.call('ZCARD', leases)}
