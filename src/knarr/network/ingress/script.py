"""The script inside HAProxy that walks through lists of alternatives (`alternatives`): conditions, redirects, changes of headers and paths.

Role: `haproxy` writes it beside its configuration. It runs only for requests whose map entry names a list, so that plain
routes cost nothing. Regular expressions are HAProxy's own (PCRE); its standard converter is used for them.

Actions: request-set/-add/-remove and answer-set/-add/-remove NAME VALUE (headers); host VALUE; path VALUE; prefix OLD NEW;
capture PATTERN REPLACEMENT (of the whole path); redirect CODE SCHEME HOST PORT KIND OLD NEW
(KIND: full, prefix, url, or keep for the path as it is); reply CODE [NAME VALUE]...; password REALM NAME (basic authentication
against `passwords`); judge PLACE PATH HOST SIGNIN HEADERS (another server is asked whether the request may pass); hash TEXT (the endpoint follows from variables); limit KIND NAME NUMBER NETWORKS (what the configuration counts, but not for these); size BYTES; timeout
MILLISECONDS; sticky COOKIE ATTRIBUTES; origin PATTERN... (allowed origins of CORS); mirror PERCENT TARGET (a copy of the request goes there, too);
cors CREDENTIALS METHODS HEADERS EXPOSED SECONDS ORIGIN... (answers preflight requests, "*" is what was asked for); server NAME (how TLS is spoken);
certified MODE PAGE PATTERN PASS (certificates of clients); connect SECONDS; once (not tried again); mirror-url URL HOST BODY;
errors STATUSES TARGET NAMESPACE INGRESS SERVICE PORT (another server's page stands in for such answers).
"""

SCRIPT = r"""
local rules = Map.new("FOLDER/rules.map", Map._str)

local targets = Map.new("FOLDER/targets.map", Map._str)
local known, known_count = {}, 0

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

local function over_tls(txn)
  return tonumber(txn.f:ssl_fc()) == 1
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

local function cookie(txn, name)
  for part in (header(txn, "cookie") or ""):gmatch("[^;,]+") do
    local key, value = part:match("^%s*([^=]*)=(.-)%s*$")
    if key == name then return value end
  end
  return nil
end

local function source_is_in(txn, networks)
  for network in networks:gmatch("%S+") do
    if core.match_addr(core.parse_addr(txn.sf:src()), core.parse_addr(network)) then return true end
  end
  return false
end

local holds
function holds(txn, condition)
  local what, name, wanted = condition[1], condition[2], condition[3] or ""
  if what:sub(1, 1) == "!" then return not holds(txn, {what:sub(2), name, wanted}) end
  if what == "m" then return txn.sf:method() == wanted end
  if what == "t" then return (over_tls(txn) and "1" or "0") == wanted end
  if what == "w" or what == "d" then return math.random() * 100 < tonumber(wanted) end
  if what == "p" then return (txn.sf:path() .. "/"):sub(1, #wanted) == wanted end
  if what == "i" then return source_is_in(txn, wanted) end
  local value
  if what == "c" then return cookie(txn, name) == wanted end
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
  local own = over_tls(txn) and "https" or "http"
  local path, query = txn.sf:path(), txn.sf:query() or ""
  local asked, asked_port = (header(txn, "host") or ""):match("^(.-):(%d+)$")
  if not asked then asked, asked_port = header(txn, "host") or "", "" end
  if kind == "full" then path = new elseif kind == "prefix" then path = replaced_prefix(path, old, new) end
  if port == "" and scheme == "" then port = txn:get_var("txn.door") and tostring(txn.sf:dst_port()) or asked_port end
  if scheme == "" then scheme = own end
  if (scheme == "http" and port == "80") or (scheme == "https" and port == "443") then port = "" end
  local url = scheme .. "://" .. (host ~= "" and host or asked) .. (port ~= "" and ":" .. port or "") .. path
  if query ~= "" and kind ~= "url" then url = url .. "?" .. query end
  if kind == "url" then url = new end
  local reply = txn:reply({status = code})
  reply:add_header("location", url)
  txn:done(reply)
end

local function refuse(txn, code, text, name, value)
  local reply = txn:reply({status = code})
  reply:add_header("content-type", "text/plain")
  if name then reply:add_header(name, value) end
  reply:set_body(text)
  txn:done(reply)
end

local function asked(name, credentials)
  local socket = core.tcp()
  socket:settimeout(10)
  if not socket:connect("unix@FOLDER/passwords.sock") then return nil end
  socket:send(name .. "\n" .. credentials .. "\n")
  local line = socket:receive("*l")
  socket:close()
  return line
end

local function password(txn, action)
  local name = action[3]
  local credentials = (header(txn, "authorization") or ""):match("^[Bb]asic%s+([%w+/=]+)%s*$")
  local good = false
  if credentials then
    -- Another state of the Secret is another key: what was known is forgotten with it.
    local key = name .. " " .. (targets:lookup("users|" .. name) or "") .. " " .. credentials
    if known[key] == nil then
      local line = asked(name, credentials)
      if line == nil then return refuse(txn, 503, "passwords cannot be checked") end
      if known_count >= 1000 then known, known_count = {}, 0 end
      known[key], known_count = line == "1", known_count + 1
    end
    good = known[key]
  end
  if not good then refuse(txn, 401, "401 Authorization Required", "www-authenticate", 'Basic realm="' .. action[2]:gsub('["\\]', "") .. '"') end
end

local function limit(txn, action)
  if action[5] ~= "" and source_is_in(txn, action[5]) then return end
  txn:set_var("txn." .. action[2] .. "_key", action[3] .. "|" .. txn.sf:src())
  txn:set_var("txn." .. action[2] .. "_limit", tonumber(action[4]))
end

local function sticky(txn, action)
  local target = txn:get_var("txn.target")
  local before = cookie(txn, action[2])
  local place = before and before:match("^%x+$") and targets:lookup(target .. "@" .. before)
  if not place then
    local count = tonumber(targets:lookup(target) or "0")
    if count == 0 then return end
    local address, port, mark = targets:lookup(target .. "#" .. (math.random(count) - 1)):match("^(.-)|(.-)|(.*)$")
    place = address .. "|" .. port
    txn:set_var("txn.cookie", action[2] .. "=" .. mark .. "; " .. action[3])
  end
  txn:set_var("txn.place", place)
end

local function variable(txn, name)
  if name == "request_uri" then return txn.sf:pathq() end
  if name == "uri" then return txn.sf:path() end
  if name == "remote_addr" then return txn.sf:src() end
  if name == "host" then return (header(txn, "host") or ""):gsub(":%d+$", "") end
  if name == "scheme" then return over_tls(txn) and "https" or "http" end
  local kind, rest = name:match("^(%a+)_(.+)$")
  if kind == "http" then return header(txn, rest:gsub("_", "-")) or "" end
  if kind == "arg" then return parameter(txn, rest) or "" end
  if kind == "cookie" then return cookie(txn, rest) or "" end
  if name == "escaped_request_uri" then
    return (txn.sf:pathq():gsub("[^%w%-._~]", function(char) return string.format("%%%02X", char:byte()) end))
  end
  return ""
end

local function expanded(txn, text)
  return (text:gsub("%$([%w_]+)", function(name) return (variable(txn, name)) end))
end

local function hash(txn, action)
  local target, key = txn:get_var("txn.target"), expanded(txn, action[2])
  local count, best, place = tonumber(targets:lookup(target) or "0"), -1, nil
  -- The endpoint with the highest hash of its mark and the key: one that goes moves only what was its own.
  for i = 0, count - 1 do
    local address, port, mark = targets:lookup(target .. "#" .. i):match("^(.-)|(.-)|(.*)$")
    local value = 5381
    for position = 1, #key + #mark do value = (value * 33 ~ (mark .. key):byte(position)) & 0xffffffff end
    value = (value ~ (value >> 15)) * 0x2c1b3c6d & 0xffffffff
    value = value ~ (value >> 12)
    if value > best then best, place = value, address .. "|" .. port end
  end
  if place then txn:set_var("txn.place", place) end
end

local function request_headers(txn)
  local headers = {}
  for name, values in pairs(txn.http:req_get_headers()) do
    if name ~= "connection" and name ~= "content-length" and name ~= "transfer-encoding" and name ~= "upgrade" then
      headers[name] = {}
      for i = 0, #values do headers[name][i + 1] = values[i] end
    end
  end
  return headers
end

local function judge(txn, action)
  local headers = request_headers(txn)
  local own = variable(txn, "scheme") .. "://" .. (header(txn, "host") or "") .. txn.sf:pathq()
  headers["host"] = {action[4]}
  headers["x-original-url"] = {own}
  headers["x-original-method"] = {txn.sf:method()}
  headers["x-auth-request-redirect"] = {txn.sf:pathq()}
  headers["x-forwarded-for"] = {txn.sf:src()}
  local done, answer = pcall(function() return core.httpclient():get({url = action[2] .. action[3], headers = headers, timeout = 5000}) end)
  local status = done and answer and answer.status or 500
  if status >= 200 and status < 300 then
    for _, name in ipairs(split(action[6], ",")) do
      local found = answer.headers and answer.headers[name:lower()]
      if found then txn.http:req_set_header(name, found[0]) else txn.http:req_del_header(name) end
    end
  elseif status == 401 and action[5] ~= "" then
    local to = expanded(txn, action[5])
    if not action[5]:find("rd=", 1, true) then
      local back = own:gsub("[^%w%-._~]", function(char) return string.format("%%%02X", char:byte()) end)
      to = to .. (to:find("?", 1, true) and "&" or "?") .. "rd=" .. back
    end
    refuse(txn, 302, "", "location", to)
  elseif status == 401 or status == 403 then
    local challenge = answer.headers and answer.headers["www-authenticate"]
    refuse(txn, status, status .. " " .. (answer.reason or ""), challenge and "www-authenticate", challenge and challenge[0])
  else
    refuse(txn, 500, "500 Internal Server Error")
  end
end

local function origin(txn, action)
  local given = header(txn, "origin")
  if not given then return end
  for i = 2, #action do
    local pattern = action[i]:gsub("[%^%$%(%)%%%.%[%]%+%-%?]", "%%%0"):gsub("%*", "[^/]*")
    if action[i] == "*" or given:match("^" .. pattern .. "$") then txn:set_var("txn.origin", given) end
  end
end

local function copy_to(txn, action)
  local method, headers, body = txn.sf:method():lower(), request_headers(txn), action[4] ~= "" and txn.sf:req_body() or ""
  headers["host"] = {action[3]}
  local url = expanded(txn, action[2])
  core.register_task(function()
    local client = core.httpclient()
    if client[method] then pcall(client[method], client, {url = url, headers = headers, body = body ~= "" and body or nil, timeout = 5000}) end
  end)
end

local function copy(txn, target)
  local count = tonumber(targets:lookup(target) or "0")
  if count == 0 then return end
  local address, port = targets:lookup(target .. "#" .. (math.random(count) - 1)):match("^([^|]*)|([^|]*)")
  if address:find(":", 1, true) then address = "[" .. address .. "]" end
  local method = txn.sf:method():lower()
  local headers = request_headers(txn)
  local url = "http://" .. address .. ":" .. port .. txn.sf:pathq()
  local body = txn.sf:req_body()
  core.register_task(function()
    local client = core.httpclient()
    -- Nobody waits for the answer.
    if client[method] then pcall(client[method], client, {url = url, headers = headers, body = body ~= "" and body or nil, timeout = 5000}) end
  end)
end

local function held_by(txn)
  -- Values that a text cannot hold, for as long as the request lives.
  local held = txn:get_priv()
  if not held then
    held = {}
    txn:set_priv(held)
  end
  return held
end

local function stand_in(txn)
  local held = held_by(txn).errors
  local action, status = held.action, tostring(txn.sf:status())
  if not (" " .. action[2] .. " "):find(" " .. status .. " ", 1, true) then return end
  local count = tonumber(targets:lookup(action[3]) or "0")
  if count == 0 then return end
  local address, port = targets:lookup(action[3] .. "#" .. (math.random(count) - 1)):match("^([^|]*)|([^|]*)")
  if address:find(":", 1, true) then address = "[" .. address .. "]" end
  local headers = {
    ["host"] = {held.host}, ["x-code"] = {status}, ["x-format"] = {held.accept}, ["x-original-uri"] = {held.uri}, ["x-namespace"] = {action[4]},
    ["x-ingress-name"] = {action[5]}, ["x-service-name"] = {action[6]}, ["x-service-port"] = {action[7]}, ["x-request-id"] = {held.id},
  }
  local done, answer = pcall(function() return core.httpclient():get({url = "http://" .. address .. ":" .. port .. "/", headers = headers, timeout = 5000}) end)
  if not done or not answer or not answer.status or answer.status == 0 then return end
  local reply = txn:reply({status = answer.status, reason = answer.reason})
  for name, values in pairs(answer.headers or {}) do
    if name ~= "connection" and name ~= "content-length" and name ~= "transfer-encoding" then
      for i = 0, #values do reply:add_header(name, values[i]) end
    end
  end
  reply:set_body(answer.body or "")
  txn:done(reply)
end

local function mirror(txn)
  for _, action in ipairs(held_by(txn).copies or {}) do copy_to(txn, action) end
  for target in txn:get_var("txn.mirror"):gmatch("%S+") do copy(txn, target) end
end

local function cors_headers(action, asked_method, asked_headers)
  local out = {}
  if action[2] ~= "" then out["Access-Control-Allow-Credentials"] = "true" end
  if action[5] ~= "" then out["Access-Control-Expose-Headers"] = action[5] end
  if asked_method then
    out["Access-Control-Allow-Methods"] = action[3] == "*" and asked_method or action[3] ~= "" and action[3] or nil
    out["Access-Control-Allow-Headers"] = action[4] == "*" and asked_headers or action[4] ~= "" and action[4] or nil
    out["Access-Control-Max-Age"] = action[6]
  end
  return out
end

local function cors(txn, action)
  local given = header(txn, "origin")
  if not given then return end
  origin(txn, {"origin", table.unpack(action, 7)})
  local wanted = header(txn, "access-control-request-method")
  if txn.sf:method() ~= "OPTIONS" or not wanted then
    if txn:get_var("txn.origin") then txn:set_var("txn.cors", 1) end
    return
  end
  local reply, allowed = txn:reply({status = 204}), txn:get_var("txn.origin")
  if allowed then
    reply:add_header("Access-Control-Allow-Origin", allowed)
    reply:add_header("Vary", "Origin")
    for name, text in pairs(cors_headers(action, wanted, header(txn, "access-control-request-headers"))) do reply:add_header(name, text) end
  end
  txn:done(reply)
end

local function certified(txn, action)
  for _, name in ipairs({"verify", "subject-dn", "issuer-dn", "cert"}) do txn.http:req_del_header("ssl-client-" .. name) end
  if not over_tls(txn) then
    -- A redirect to TLS that follows tells nothing.
    if not txn:get_var("txn.flags"):find("R", 1, true) then refuse(txn, 400, "400 No required SSL certificate was sent") end
    return
  end
  -- Another name would have been asked for another authority's certificate, or for none.
  if (txn.f:ssl_fc_sni() or ""):lower() ~= txn:get_var("txn.host") then return refuse(txn, 421, "421 Misdirected Request") end
  local good = tonumber(txn.f:ssl_c_used()) == 1 and tonumber(txn.f:ssl_c_verify()) == 0
  if not good and action[2] == "on" then
    if action[3] ~= "" then return refuse(txn, 302, "", "location", expanded(txn, action[3])) end
    return refuse(txn, 400, "400 No required SSL certificate was sent")
  end
  txn.http:req_set_header("ssl-client-verify", good and "SUCCESS" or "NONE")
  if not good then return end
  if action[4] ~= "" and txn.c:regsub("CN=" .. (txn.f:ssl_c_s_dn("cn") or ""), ".*" .. action[4] .. ".*", "\1") ~= "\1" then
    return refuse(txn, 403, "403 Forbidden")
  end
  txn.http:req_set_header("ssl-client-subject-dn", txn.f:ssl_c_s_dn("", 0, "rfc2253") or "")
  txn.http:req_set_header("ssl-client-issuer-dn", txn.f:ssl_c_i_dn("", 0, "rfc2253") or "")
  if action[5] ~= "" then
    local text = txn.c:base64(txn.f:ssl_c_der()):gsub(("."):rep(64), "%0\n")
    local pem = "-----BEGIN CERTIFICATE-----\n" .. text:gsub("\n$", "") .. "\n-----END CERTIFICATE-----\n"
    txn.http:req_set_header("ssl-client-cert", (pem:gsub("[^%w%-._~]", function(char) return string.format("%%%02X", char:byte()) end)))
  end
end

local change = {
  ["certified"] = certified,
  ["password"] = password,
  ["limit"] = limit,
  ["judge"] = judge,
  ["hash"] = hash,
  ["size"] = function(txn, action)
    local told = tonumber(header(txn, "content-length") or "")
    if told and told > tonumber(action[2]) then return refuse(txn, 413, "413 Request Entity Too Large") end
    local method = txn.sf:method()
    local some = header(txn, "transfer-encoding") or (txn.sf:req_ver() == "2.0" and method ~= "GET" and method ~= "HEAD")
    if not told and some then
      txn:set_var("txn.size", tonumber(action[2]))
      txn:set_var("txn.variant", "-sized")
    end
  end,
  ["timeout"] = function(txn, action) txn:set_var("txn.timeout", tonumber(action[2])) end,
  ["sticky"] = sticky,
  ["origin"] = origin,
  ["cors"] = cors,
  ["connect"] = function(txn, action)
    if not txn:get_var("txn.variant") then txn:set_var("txn.variant", "-" .. action[2]) end
  end,
  ["once"] = function(txn) txn:set_var("txn.once", 1) end,
  ["mirror-url"] = function(txn, action)
    local held = held_by(txn)
    held.copies = held.copies or {}
    held.copies[#held.copies + 1] = action
    txn:set_var("txn.mirror", txn:get_var("txn.mirror") or "")
  end,
  ["errors"] = function(txn, action)
    held_by(txn).errors = {action = action, accept = header(txn, "accept") or "", uri = txn.sf:pathq(), host = header(txn, "host") or "", id = header(txn, "x-request-id") or ""}
    txn:set_var("txn.errors", 1)
  end,
  ["server"] = function(txn, action) txn:set_var("txn.server", action[2]) end,
  ["mirror"] = function(txn, action)
    if math.random() * 100 < tonumber(action[2]) then txn:set_var("txn.mirror", (txn:get_var("txn.mirror") or "") .. " " .. action[3]) end
  end,
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
    local allowed = txn:get_var("txn.origin")
    if allowed then
      reply:add_header("Access-Control-Allow-Origin", allowed)
      reply:add_header("Vary", "Origin")
    end
    txn:done(reply)
  end,
}

-- Counts bodies whose length nobody told, and cuts off those that grow too long.
local Size = {id = "lua.size", flags = filter.FLT_CFG_FL_HTX}
Size.__index = Size

function Size:new()
  return setmetatable({seen = 0}, self)
end

function Size:start_analyze(txn, channel)
  if not channel:is_resp() then filter.register_data_filter(self, channel) end
end

function Size:http_payload(txn, message)
  if message.channel:is_resp() then return end
  self.seen = self.seen + message:input()
  if self.seen > (txn:get_var("txn.size") or 0) then
    local reply = txn:reply({status = 413})
    reply:set_body("413 Request Entity Too Large")
    txn:done(reply)
    return filter.ERROR
  end
end

core.register_filter("size", Size, function(class) return class end)

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
      if after or txn:get_var("txn.cookie") or txn:get_var("txn.origin") then txn:set_var("txn.after", fields[4]) end
      return
    end
  end
  local reply = txn:reply({status = 404})
  reply:add_header("content-type", "text/plain")
  reply:set_body("default backend - 404")
  txn:done(reply)
end, 0)

core.register_action("mirror", {"http-req"}, mirror, 0)

core.register_action("stand_in", {"http-res"}, stand_in, 0)

core.register_action("answered", {"http-res"}, function(txn)
  local set, allowed = txn:get_var("txn.cookie"), txn:get_var("txn.origin")
  if set then txn.http:res_add_header("Set-Cookie", set) end
  if allowed then
    txn.http:res_set_header("Access-Control-Allow-Origin", allowed)
    txn.http:res_add_header("Vary", "Origin")
  end
  for _, action in ipairs(items(txn:get_var("txn.after"))) do
    if action[1] == "answer-set" then txn.http:res_set_header(action[2], action[3])
    elseif action[1] == "answer-add" then txn.http:res_add_header(action[2], action[3])
    elseif action[1] == "answer-remove" then txn.http:res_del_header(action[2])
    elseif action[1] == "cors" and allowed then
      for name, text in pairs(cors_headers(action)) do txn.http:res_set_header(name, text) end
    end
  end
end, 0)
"""
