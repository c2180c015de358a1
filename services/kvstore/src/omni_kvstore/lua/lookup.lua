-- Longest leading run of blocks per holder. ARGV: model ('' any), block_size ('0' any), keys.
-- Returns worker, medium, blocks, flattened.
local KEY_BYTES = 16
local model, block_size, keys = ARGV[1], ARGV[2], ARGV[3]
local result = {}

local function worker_of(holder)
  local worker = redis.call('HGET', prefix .. ':runs', int(math.floor(tonumber(holder) / 8)))
  if not worker then
    return nil
  end
  local shape = redis.call('HMGET', worker_key(worker), 'model', 'block_size')
  local fits = (model == '' or shape[1] == model) and (block_size == '0' or shape[2] == block_size)
  return fits and worker or nil
end

local active, workers = {}, {}
if #keys >= KEY_BYTES then
  for _, holder in ipairs(redis.call('SMEMBERS', block_key(string.sub(keys, 1, KEY_BYTES)))) do
    workers[holder] = worker_of(holder)
    if workers[holder] then
      active[#active + 1] = holder
    end
  end
end

local function close(holder, blocks)
  result[#result + 1] = workers[holder]
  result[#result + 1] = tonumber(holder) % 8
  result[#result + 1] = blocks
end

local count = #keys / KEY_BYTES
for i = 2, count do
  if #active == 0 then
    break
  end
  local block = string.sub(keys, (i - 1) * KEY_BYTES + 1, i * KEY_BYTES)
  local holds = redis.call('SMISMEMBER', block_key(block), unpack(active))
  local still = {}
  for j, holder in ipairs(active) do
    if holds[j] == 1 then
      still[#still + 1] = holder
    else
      close(holder, i - 1)
    end
  end
  active = still
end
for _, holder in ipairs(active) do
  close(holder, count)
end
return result
