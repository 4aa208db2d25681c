"""What Redis runs as one step. All keys have one prefix, which begins with a format version and holds the
cluster's name in braces, so that they share a slot where Redis is itself a cluster.

    PREFIX controller        hash: epoch, address, agreement, welcome
    PREFIX version           number
    PREFIX names             set of worker ids
    PREFIX member:WORKER     hash: epoch, body
    PREFIX past:WORKER       list of epochs, newest first
    PREFIX blocks            hash: identity of a block -> length of its prefix and its holders, packed

Every key has a time to live. Epochs are 16 hexadecimal digits. KEYS[1] is PREFIX controller, ARGV[1] PREFIX;
what writes gets the writer's epoch as ARGV[2] and the lease in milliseconds as ARGV[3].
"""

FORMAT_VERSION = 1

_REQUIRE_WRITER = """
if redis.call('HGET', KEYS[1], 'epoch') ~= ARGV[2] then return 'FENCED' end
local prefix, lease = ARGV[1], ARGV[3]
"""

CLAIM = """
local held = redis.call('HGET', KEYS[1], 'epoch')
if held and held ~= ARGV[2] and ARGV[7] == '0' then return 'FENCED' end
redis.call('HSET', KEYS[1], 'epoch', ARGV[2], 'address', ARGV[4], 'agreement', ARGV[5], 'welcome', ARGV[6])
redis.call('PEXPIRE', KEYS[1], ARGV[3])
return 'OK'
"""
"""Also: address, agreement, welcome, and whether to take over (1 or 0). FENCED or OK."""

PUBLISH = (
    _REQUIRE_WRITER
    + "local past_most = {past_most}\nlocal version_key, names = prefix .. 'version', prefix .. 'names'\n"
    + """
local function retire(worker, epoch)
  local past = prefix .. 'past:' .. worker
  redis.call('LPUSH', past, epoch)
  redis.call('LTRIM', past, 0, past_most - 1)
end
local refused = {}
local at = 6
for _ = 1, tonumber(ARGV[5]) do
  local worker, epoch = ARGV[at], ARGV[at + 1]
  at = at + 2
  if redis.call('HGET', prefix .. 'member:' .. worker, 'epoch') == epoch then
    redis.call('DEL', prefix .. 'member:' .. worker)
    retire(worker, epoch)
  end
  redis.call('PEXPIRE', prefix .. 'past:' .. worker, lease)
end
while at <= #ARGV do
  local worker, epoch, body = ARGV[at], ARGV[at + 1], ARGV[at + 2]
  local member, past = prefix .. 'member:' .. worker, prefix .. 'past:' .. worker
  at = at + 3
  if redis.call('LPOS', past, epoch) then
    refused[#refused + 1] = worker
  else
    local held = redis.call('HGET', member, 'epoch')
    if held and held ~= epoch then retire(worker, held) end
    redis.call('HSET', member, 'epoch', epoch, 'body', body)
    redis.call('PEXPIRE', member, lease)
    redis.call('SADD', names, worker)
  end
  redis.call('PEXPIRE', past, lease)
end
if ARGV[4] ~= '' then redis.call('SET', version_key, ARGV[4], 'PX', lease) end
redis.call('PEXPIRE', names, lease)
return refused
"""
)
"""Also: version (none but with the last part), number of lives that are gone, those as worker and epoch, then
members as worker, epoch and body. FENCED, or the workers refused.
"""

HEAD = """
local prefix = ARGV[1]
local names = redis.call('SMEMBERS', prefix .. 'names')
local controller = redis.call('HMGET', KEYS[1], 'epoch', 'address', 'agreement', 'welcome')
return {redis.call('GET', prefix .. 'version') or '0', controller, names}
"""
"""Version, controller, and all workers that ever were."""

MEMBERS = """
local prefix, found = ARGV[1], {}
for at = 2, #ARGV do
  local worker = ARGV[at]
  local member = redis.call('HMGET', prefix .. 'member:' .. worker, 'epoch', 'body')
  found[#found + 1] = {member[1], member[2], redis.call('LRANGE', prefix .. 'past:' .. worker, 0, -1)}
end
return found
"""
"""Also: workers. For each, epoch and body if it is a member, and its past epochs."""

PUBLISH_BLOCKS = (
    _REQUIRE_WRITER
    + """
local blocks, room = prefix .. 'blocks', tonumber(ARGV[4])
if ARGV[5] == '1' then redis.call('UNLINK', blocks) end
room = room - redis.call('HLEN', blocks)
for at = 6, #ARGV, 2 do
  local identity, held = ARGV[at], ARGV[at + 1]
  if held == '' then
    room = room + redis.call('HDEL', blocks, identity)
  elseif room > 0 or redis.call('HEXISTS', blocks, identity) == 1 then
    room = room - redis.call('HSET', blocks, identity, held)
  end
end
redis.call('PEXPIRE', blocks, lease)
return redis.call('HLEN', blocks)
"""
)
"""Also: how many blocks may be kept, whether those written before are gone (1 or 0), then blocks as identity
and what is kept of it, empty for one that is gone. FENCED, or the number kept.
"""
