-- How far each worker's prefix reaches, tier by tier. ARGV: namespace, keys of the prompt's blocks.
-- Returns worker, medium, pool, blocks, flattened; worker '' stands for every worker without a row of its own.
-- A row says: with tiers up to this one the prefix has this many blocks.
local SPAN_BLOCKS, FIRST_READ = 1024, 32
local namespace = redis.call('HGET', prefix .. ':namespaces', ARGV[1])
local blocks = split(ARGV[2])
if not namespace or #blocks == 0 then
  return {}
end

-- Tier of a medium: 1000 * medium; of a pool: that + its rank by name.
local pools, pool_tier = redis.call('SMEMBERS', pools_key(namespace)), {}
table.sort(pools)
for rank, pool in ipairs(pools) do
  pool_tier[pool] = 1000 * tonumber(redis.call('HGET', worker_key(pool), 'pool_medium') or '4') + rank
end
local NONE = 9999

-- Run (as it is packed) -> its worker; false where it has ended.
local names = {}
local function learn(holders)
  local packed, runs = {}, {}
  for at = 1, #holders, HOLDER_BYTES do
    local run = string.sub(holders, at, at + 3)
    if names[run] == nil then
      names[run] = false
      packed[#packed + 1] = run
      runs[#runs + 1] = int(struct.unpack('>I4', run))
    end
  end
  each_chunk(runs, function(first, last)
    local found = redis.call('HMGET', prefix .. ':runs', unpack(runs, first, last))
    for i = first, last do
      names[packed[i]] = found[i - first + 1]
    end
  end)
end

-- Workers -> tier of their own copy, and the nearest pool's tier, of a packed list of holders.
local function read_holders(holders)
  local own, shared = {}, NONE
  learn(holders)
  for at = 1, #holders, HOLDER_BYTES do
    local name, media = names[string.sub(holders, at, at + 3)], string.byte(holders, at + 4)
    if name and pool_tier[name] then
      shared = math.min(shared, pool_tier[name])
    elseif name then
      for medium = 1, 4 do
        if bit.band(media, 2 ^ medium) ~= 0 then
          own[name] = 1000 * medium
          break
        end
      end
    end
  end
  return own, shared
end

-- Worker -> the highest tier its prefix has needed so far, and the rows it has; '' is anyone without own blocks yet.
local needs, rows = { [''] = 0 }, { [''] = {} }

local function close(worker, tier, count)
  if tier > 0 and count > 0 then
    local list = rows[worker]
    list[#list + 1] = { tier, count }
  end
end

-- Block `index` (from 0) is to be had by these; false once nobody's prefix goes on.
local function step(own, shared, index)
  if needs[''] then
    for worker in pairs(own) do
      if needs[worker] == nil and not rows[worker] then
        needs[worker] = needs['']
        rows[worker] = { unpack(rows['']) }
      end
    end
  end
  local goes_on = false
  for worker, need in pairs(needs) do
    local tier = math.min(own[worker] or NONE, shared)
    if tier == NONE then
      close(worker, need, index)
      needs[worker] = nil
    else
      if tier > need then
        close(worker, need, index)
        needs[worker] = tier
      end
      goes_on = true
    end
  end
  return goes_on
end

local function walk()
  local last_holders, own, shared
  local first = 1
  while first <= #blocks do
    local head = math.floor((first - 1) / SPAN_BLOCKS) * SPAN_BLOCKS + 1
    local count = first == 1 and FIRST_READ or CHUNK
    local last = math.min(first + count - 1, head + SPAN_BLOCKS - 1, #blocks)
    local values = redis.call('HMGET', span_key(namespace, blocks[head]), unpack(blocks, first, last))
    for i = 1, #values do
      local holders = values[i] or ''
      if holders ~= last_holders then
        last_holders = holders
        own, shared = read_holders(holders)
        if not step(own, shared, first + i - 2) then
          return
        end
      end
    end
    first = last + 1
  end
  for worker, need in pairs(needs) do
    close(worker, need, #blocks)
  end
end

walk()
local name_of_tier = {}
for pool, tier in pairs(pool_tier) do
  name_of_tier[tier] = pool
end
-- Blocks of its own that add nothing to what pools give everyone need no rows.
local function is_as_anyone(list)
  local anyone = rows['']
  for i = 1, math.max(#list, #anyone) do
    if not (list[i] and anyone[i] and list[i][1] == anyone[i][1] and list[i][2] == anyone[i][2]) then
      return false
    end
  end
  return true
end

local result = {}
for worker, list in pairs(rows) do
  for _, row in ipairs(worker ~= '' and is_as_anyone(list) and {} or list) do
    result[#result + 1] = worker
    result[#result + 1] = math.floor(row[1] / 1000)
    result[#result + 1] = name_of_tier[row[1]] or ''
    result[#result + 1] = row[2]
  end
end
return result
