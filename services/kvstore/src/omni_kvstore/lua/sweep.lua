-- Remove at most `budget` entries of one retired run. ARGV: budget. Returns how many runs are left.
local budget = tonumber(ARGV[1])
local trash = prefix .. ':trash'
local run = redis.call('HKEYS', trash)[1]
if not run then
  return 0
end
local _, removed = pop_deepest(redis.call('HGET', trash, run), run, budget)
if removed < budget then
  redis.call('HDEL', trash, run)
end
return redis.call('HLEN', trash)
