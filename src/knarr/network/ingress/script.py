"""The script inside HAProxy that walks through lists of alternatives (`alternatives`): conditions, redirects, changes of headers and paths.

Role: `haproxy` writes it beside its configuration. It runs only for requests whose map entry names a list, so that plain
routes cost nothing. Regular expressions are HAProxy's own (PCRE); its standard converter is used for them.

Actions: request-set/-add/-remove and answer-set/-add/-remove NAME VALUE (headers); host VALUE; path VALUE; prefix OLD NEW;
capture PATTERN REPLACEMENT (of the whole path); redirect CODE SCHEME HOST PORT KIND OLD NEW
(KIND: full, prefix or url); reply CODE [NAME VALUE]...
"""

SCRIPT = r"""
local rules = Map.new("FOLDER/rules.map", Map._str)

local function decode(text)
  return (text:gsub("%%(%x%x)", function(hex) return string.char(tonumber(hex, 16)) end))
end

local function split(text, mark)
  local out = {}
  if text == "" then return out end
  for part in (text .. mark):gmatch("([^" .. mark .. "]*)" .. mark) do out[#out + 1] = part end
  return out
end

local function items(text)
  local out = {}
  for _, part in ipairs(split(text, ",")) do
    local fields = split(part, ":")
    for i, field in ipairs(fields) do fields[i] = decode(field) end
    out[#out + 1] = fields
  end
  return out
end

local function matches(txn, pattern, text)
  return txn.c:regsub(text, "^(?:" .. pattern .. ")$", "\1") == "\1"
end

local function header(txn, name)
  local found = txn.http:req_get_headers()[name:lower()]
  if not found then return nil end
  local out, i = found[0], 1
  while found[i] do out, i = out .. "," .. found[i], i + 1 end
  return out
end

local function parameter(txn, name)
  for part in (txn.sf:query() or ""):gmatch("[^&]+") do
    local key, value = part:match("^([^=]*)=?(.*)$")
    if decode(key:gsub("+", " ")) == name then return decode((value:gsub("+", " "))) end
  end
  return nil
end

local function source_is_in(txn, networks)
  for network in networks:gmatch("%S+") do
    if core.match_addr(core.parse_addr(txn.sf:src()), core.parse_addr(network)) then return true end
  end
  return false
end

local function holds(txn, condition)
  local what, name, wanted = condition[1], condition[2], condition[3] or ""
  if what == "m" then return txn.sf:method() == wanted end
  if what == "t" then return (txn.sf:dst_port() == HTTPS_PORT and "1" or "0") == wanted end
  if what == "w" then return math.random(100) <= tonumber(wanted) end
  if what == "i" then return source_is_in(txn, wanted) end
  local value
  if what == "h" or what == "H" then value = header(txn, name) else value = parameter(txn, name) end
  if not value then return false end
  if what == "h" or what == "q" then return value == wanted end
  return matches(txn, wanted, value)
end

local function all_hold(txn, conditions)
  for _, condition in ipairs(items(conditions)) do
    if not holds(txn, condition) then return false end
  end
  return true
end

local function replaced_prefix(path, old, new)
  old, new = old:gsub("/$", ""), new:gsub("/$", "")
  local rest = path:sub(#old + 1)
  if rest ~= "" and rest:sub(1, 1) ~= "/" then rest = "/" .. rest end
  local out = new .. rest
  if out == "" then return "/" end
  return out
end

local function redirect(txn, action)
  local code, scheme, host, port, kind, old, new = tonumber(action[2]), action[3], action[4], action[5], action[6], action[7], action[8]
  local own = txn.sf:dst_port() == HTTPS_PORT and "https" or "http"
  local path, query = txn.sf:path(), txn.sf:query() or ""
  local asked, asked_port = (header(txn, "host") or ""):match("^(.-):?(%d*)$")
  if kind == "full" then path = new elseif kind == "prefix" then path = replaced_prefix(path, old, new) end
  if port == "" and scheme == "" then port = asked_port end
  if scheme == "" then scheme = own end
  if (scheme == "http" and port == "80") or (scheme == "https" and port == "443") then port = "" end
  local url = scheme .. "://" .. (host ~= "" and host or asked) .. (port ~= "" and ":" .. port or "") .. path
  if query ~= "" and kind ~= "url" then url = url .. "?" .. query end
  if kind == "url" then url = new end
  local reply = txn:reply({status = code})
  reply:add_header("location", url)
  txn:done(reply)
end

local change = {
  ["request-set"] = function(txn, action) txn.http:req_set_header(action[2], action[3]) end,
  ["request-add"] = function(txn, action) txn.http:req_add_header(action[2], action[3]) end,
  ["request-remove"] = function(txn, action) txn.http:req_del_header(action[2]) end,
  ["host"] = function(txn, action) txn.http:req_set_header("host", action[2]) end,
  ["path"] = function(txn, action) txn.http:req_set_path(action[2]) end,
  ["prefix"] = function(txn, action) txn.http:req_set_path(replaced_prefix(txn.sf:path(), action[2], action[3])) end,
  ["capture"] = function(txn, action) txn.http:req_set_path(txn.c:regsub(txn.sf:path(), "^.*?" .. action[2] .. ".*$", action[3])) end,
  ["redirect"] = redirect,
  ["reply"] = function(txn, action)
    local reply = txn:reply({status = tonumber(action[2])})
    for i = 3, #action, 2 do reply:add_header(action[i], action[i + 1]) end
    txn:done(reply)
  end,
}

core.register_action("choose", {"http-req"}, function(txn)
  for _, alternative in ipairs(split(rules:lookup(txn:get_var("txn.target")) or "", ";")) do
    local fields = split(alternative, "~")
    if all_hold(txn, fields[1]) then
      txn:set_var("txn.target", decode(fields[2]))
      txn:set_var("txn.flags", fields[3])
      local after = false
      for _, action in ipairs(items(fields[4] or "")) do
        if change[action[1]] then change[action[1]](txn, action) else after = true end
      end
      if after then txn:set_var("txn.after", fields[4]) end
      return
    end
  end
  local reply = txn:reply({status = 404})
  reply:add_header("content-type", "text/plain")
  reply:set_body("default backend - 404")
  txn:done(reply)
end, 0)

core.register_action("answered", {"http-res"}, function(txn)
  for _, action in ipairs(items(txn:get_var("txn.after"))) do
    if action[1] == "answer-set" then txn.http:res_set_header(action[2], action[3])
    elseif action[1] == "answer-add" then txn.http:res_add_header(action[2], action[3])
    elseif action[1] == "answer-remove" then txn.http:res_del_header(action[2]) end
  end
end, 0)
"""
