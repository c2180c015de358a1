-- Apply one part of a batch. ARGV: worker, epoch, sequence, replaces (the part opens a snapshot), commits (the part
-- is the batch's last), completes (the batch is a snapshot), ttl_ms, max_events, max_blocks, max_entries, events.
-- An event is action, medium (1 byte each), number of keys and of positions (4 each), span (16), positions (4 each: one
-- per key, or only the first), keys (16 each). Returns {outcome, last committed sequence or epoch in force, blocks evicted}.
local worker, epoch, sequence = ARGV[1], ARGV[2], tonumber(ARGV[3])
local replaces, commits, completes = ARGV[4] == '1', ARGV[5] == '1', ARGV[6] == '1'
local ttl_ms, max_events, max_blocks, max_entries = ARGV[7], ARGV[8], tonumber(ARGV[9]), tonumber(ARGV[10])
local name = worker_key(worker)
local known = redis.call('HMGET', name, 'epoch', 'run', 'sequence', 'namespace')
local run, namespace = known[2], known[4]
-- What replicas are told: one field per event, (action, medium, number of keys, positions, keys).
local told = {}
local CLEARED, STORED, REMOVED, EVICTED = 0, 1, 2, 3
local NO_POSITIONS, MOST_EVICTED = string.rep('\0', 4), 2048
-- Small events of one kind that follow each other are told as one.
local SMALL = 16
local open = { count = 0, keys = {}, positions = {} }

local function tell_whole(action, medium, keys, positions)
  told[#told + 1] = int(#told / 2)
  told[#told + 1] = struct.pack('>BBI4', action, medium, #keys / KEY_BYTES) .. positions .. keys
end

local function close_open()
  if open.count > 0 then
    local positions = open.action == STORED and table.concat(open.positions) or NO_POSITIONS
    tell_whole(open.action, open.medium, table.concat(open.keys), positions)
    open = { count = 0, keys = {}, positions = {} }
  end
end

local function each_position(positions, count)
  if #positions == 4 * count then
    return positions
  end
  local first, all = struct.unpack('>I4', positions), {}
  for i = 1, count do
    all[i] = struct.pack('>I4', first + i - 1)
  end
  return table.concat(all)
end

local function tell(action, medium, keys, positions)
  local count = #keys / KEY_BYTES
  if open.count > 0 and (count > SMALL or open.action ~= action or open.medium ~= medium) then
    close_open()
  end
  if count > SMALL or action == CLEARED or action == EVICTED then
    return tell_whole(action, medium, keys, positions)
  end
  open.action, open.medium, open.count = action, medium, open.count + 1
  open.keys[open.count] = keys
  open.positions[open.count] = action == STORED and each_position(positions, count) or ''
end

local function position_of(positions, i)
  if #positions == 4 then
    return struct.unpack('>I4', positions) + i - 1
  end
  return (struct.unpack('>I4', positions, 4 * i - 3))
end

-- Entries to add to the run's reverse set: many events, one call.
local ranks = {}
-- How many entries there are more than before; a retired run's still count until they are swept.
local grown = 0

local function flush()
  call_in_chunks('ZADD', held_key(run), ranks)
  ranks = {}
end

local function clear()
  flush()
  grown = grown + redis.call('ZCARD', held_key(run))
  retire_run(run, namespace)
  run = new_run(worker)
  redis.call('HSET', name, 'run', run)
  tell(CLEARED, 0, '', '')
end

local function store(medium, span, keys, positions)
  local bucket, blocks = span_key(namespace, span), split(keys)
  local packed_run, mask = struct.pack('>I4', run), 2 ^ medium
  local writes = {}
  -- Neighbours mostly have the same holders: what became of the last list serves again.
  local last_before, last_after, last_is_new
  each_chunk(blocks, function(first, last)
    local values = redis.call('HMGET', bucket, unpack(blocks, first, last))
    for i = first, last do
      local before = values[i - first + 1] or ''
      if before ~= last_before then
        local at = find_run(before, packed_run)
        last_before, last_is_new = before, not at
        if at then
          local media = bit.bor(string.byte(before, at + 4), mask)
          last_after = string.sub(before, 1, at + 3) .. string.char(media) .. string.sub(before, at + HOLDER_BYTES)
        else
          last_after = before .. packed_run .. string.char(mask)
        end
      end
      if last_after ~= before then
        writes[#writes + 1] = blocks[i]
        writes[#writes + 1] = last_after
      end
      if last_is_new then
        ranks[#ranks + 1] = position_of(positions, i)
        ranks[#ranks + 1] = span .. blocks[i]
      end
    end
  end)
  if #writes > 0 then
    call_in_chunks('HSET', bucket, writes)
  end
  redis.call('PEXPIRE', bucket, ttl_ms)
end

local function remove(medium, span, keys)
  flush()
  local members = strip(namespace, span, split(keys), run, 2 ^ medium)
  for i, block in ipairs(members) do
    members[i] = span .. block
  end
  call_in_chunks('ZREM', held_key(run), members)
end

-- Keep within the bounds: the publisher's own deepest blocks make room.
local function evict()
  local excess = math.max(
    redis.call('ZCARD', held_key(run)) - max_blocks,
    tonumber(redis.call('GET', prefix .. ':entries') or '0') - max_entries
  )
  if excess <= 0 then
    return 0
  end
  local removed, count = pop_deepest(namespace, run, math.min(excess, MOST_EVICTED))
  if count > 0 then
    tell(EVICTED, 0, table.concat(removed), NO_POSITIONS)
  end
  return count
end

if not known[1] then
  return {'unknown', 0, 0}
end
if known[1] ~= epoch then
  return {tonumber(known[1]) > tonumber(epoch) and 'stale' or 'unknown', known[1], 0}
end
grown = -redis.call('ZCARD', held_key(run))
if replaces then
  clear()
  -- Until the last part commits, any other sequence than this one is a gap.
  redis.call('HSET', name, 'sequence', int(sequence - 1), 'gap', 1)
elseif sequence <= tonumber(known[3]) then
  return {'ok', known[3], 0}
elseif sequence ~= tonumber(known[3]) + 1 then
  redis.call('HSET', name, 'gap', 1)
  return {'gap', known[3], 0}
end

local packed, at = ARGV[11], 1
while at <= #packed do
  local action, medium, num_keys, num_positions = struct.unpack('>BBI4I4', packed, at)
  local span_at = at + 10
  local positions_at = span_at + KEY_BYTES
  local keys_at = positions_at + 4 * num_positions
  at = keys_at + KEY_BYTES * num_keys
  if action == CLEARED then
    clear()
  elseif num_keys > 0 then
    local span, keys = string.sub(packed, span_at, positions_at - 1), string.sub(packed, keys_at, at - 1)
    if action == STORED then
      local positions = string.sub(packed, positions_at, keys_at - 1)
      store(medium, span, keys, positions)
      tell(STORED, medium, keys, positions)
    else
      remove(medium, span, keys)
      tell(REMOVED, medium, keys, NO_POSITIONS)
    end
  end
end
flush()
redis.call('PEXPIRE', held_key(run), ttl_ms)
add_entries(grown + redis.call('ZCARD', held_key(run)))
local evicted = evict()
close_open()
if #told > 0 then
  emit(max_events, 'kind', 'blocks', 'worker', worker, 'epoch', epoch, unpack(told))
end

if commits then
  redis.call('HSET', name, 'sequence', int(sequence))
  if completes then
    redis.call('HSET', name, 'gap', 0)
  end
  if completes or sequence == 1 then
    redis.call('HSET', name, 'complete_ms', int(now_ms()))
  end
end
return {'ok', commits and int(sequence) or int(sequence - 1), evicted}
