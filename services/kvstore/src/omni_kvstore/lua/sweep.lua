-- Remove at most `budget` entries of one retired run. ARGV: budget. Returns {entries removed, runs left}.
local budget = tonumber(ARGV[1])
local trash = prefix .. ':trash'
local run = redis.call('SRANDMEMBER', trash)
if not run then
  return {0, 0}
end
local removed = 0
for medium = 0, 7 do
  local holder = holder_of(run, medium)
  for _, block in ipairs(redis.call('SPOP', held_key(holder), budget - removed)) do
    redis.call('SREM', block_key(block), holder)
    removed = removed + 1
  end
  if removed >= budget then
    return {removed, redis.call('SCARD', trash)}
  end
end
redis.call('SREM', trash, run)
return {removed, redis.call('SCARD', trash)}
