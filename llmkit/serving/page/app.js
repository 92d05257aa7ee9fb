// The page of `llmkit serve`: chat, text continuation, a token view, and labelling.
//
// A conversation is a tree of messages; `chosen` maps each message to the child that is shown. Conversations are stored
// only in this browser's localStorage. Text from people and models is inserted as text nodes, never as markup.
"use strict";

const $ = (id) => document.getElementById(id);
const MOST_SHOWN = 20000, MOST_CUT = 3000; // characters of a message; tokens in the tokenize dialog
const SHADES = [0.9, 0.5, 0.2, 0.05, 0.01]; // least probability for the shades p0 to p4
const CALLS = /^<\|(calc|python|search|result)_(start|end)\|>$/; // tokens around tool calls
const THOUGHTS = /^\s*<think>\n?([\s\S]*?)\n?<\/think>\s*/;
const HIDDEN = /[\u0000-\u001f\u007f-\u00a0\u00ad\u061c\u200b-\u200f\u2028-\u202f\u2060-\u206f\ufeff]/g;
const conversations = new Map(); // by id
const running = new Map(); // AbortControllers, by id of the node or conversation being generated
let current = null; // conversation
let pair = null; // two answers to compare: {parent, nodes}
let seen = null, showsTokens = false; // seen: the tokenized conversation
let models = [], settings = {}, collecting = false; // collecting: the server accepts judgements

// ---- elements
function make(tag, { data = {}, aria = {}, ...properties } = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  Object.assign(element.dataset, data);
  for (const [name, value] of Object.entries(aria)) element.setAttribute(`aria-${name}`, value);
  element.append(...children);
  return element;
}

function iconButton(name, label, onclick, aria = {}) {
  const [svg, use] = ["svg", "use"].map((tag) => document.createElementNS("http://www.w3.org/2000/svg", tag));
  use.setAttribute("href", `#i-${name}`);
  svg.append(use);
  const properties = { type: "button", className: "icon", title: label, onclick, data: { does: name } };
  return make("button", { ...properties, aria: { label, ...aria } }, svg);
}

const button = (text, onclick, className = "") => make("button", { type: "button", onclick, className }, text);
const prose = (...pieces) => make("div", { className: "prose", dir: "auto" }, ...pieces);
const hint = (text) => make("p", { className: "hint" }, text);
const say = (text) => { $("status").textContent = text.slice(0, 2000); }; // to screen readers
const complain = (text) => { $("alert").hidden = !text; $("complaint").textContent = text; };
// Replace blanks, control and direction characters by visible symbols
function visible(text) {
  const code = (sign) => `⟨${sign.charCodeAt(0).toString(16).toUpperCase().padStart(4, "0")}⟩`;
  return text.replace(/\n/g, "↵").replace(/\t/g, "⇥").replace(/ /g, "·").replace(HIDDEN, code);
}

function percent(logprob) {
  const share = 100 * Math.exp(logprob);
  return share < 0.01 ? "<0.01%" : `${share.toPrecision(share < 99.5 ? 2 : 3)}%`;
}

// ---- browser storage
function store(name, value, storage = () => localStorage) {
  try {
    storage().setItem(`llmkit.${name}`, JSON.stringify(value));
  } catch {
    complain("The browser's storage is full or disabled: nothing is saved. Export, then delete conversations.");
  }
}

function stored(name, otherwise, storage = () => localStorage) {
  try { return JSON.parse(storage().getItem(`llmkit.${name}`)) ?? otherwise; } catch { return otherwise; }
}

function loadConversations() {
  for (const id of stored("chats", []).filter((each) => !conversations.has(each))) {
    const conversation = stored(`chat.${id}`);
    if (conversation) conversations.set(id, conversation);
  }
}

function keep(conversation) {
  conversations.set(conversation.id, Object.assign(conversation, { updated: Date.now() }));
  store(`chat.${conversation.id}`, conversation);
  store("chats", [...new Set([...stored("chats", []), ...conversations.keys()])]); // including those of other tabs
}

// ---- the server
async function request(path, body, signal) {
  const headers = { "Content-Type": "application/json" }, key = stored("key", "", () => sessionStorage);
  if (key) headers.Authorization = `Bearer ${key}`;
  const response = await fetch(path, { method: body ? "POST" : "GET", headers, body: JSON.stringify(body), signal });
  if (response.ok) return response;
  if (response.status === 401) openSettings("key");
  const { error } = await response.json().catch(() => ({}));
  throw new Error(error?.message ?? `The server answered ${response.status}.`);
}

// The message for an error; fetch and streams raise a TypeError if the connection fails
const reason = (error) =>
  (error instanceof TypeError ? "The server does not answer. Is llmkit serve still running?" : error.message);
const json = async (...of) => (await request(...of)).json();
const detokenize = (model, tokens) => json("/detokenize", { model, tokens, return_token_strs: true });
// Yield the choices from a stream of server-sent events
async function* choices(path, body, signal) {
  const { body: bytes } = await request(path, { ...body, stream: true }, signal);
  const reader = bytes.pipeThrough(new TextDecoderStream()).getReader();
  for (let waiting = "", step = await reader.read(); !step.done; step = await reader.read()) {
    const events = (waiting + step.value).split("\n\n");
    waiting = events.pop();
    for (const data of events.filter((event) => event.startsWith("data: {")).map((event) => event.slice(6))) {
      const { error, choices: [choice] = [] } = JSON.parse(data);
      if (error) throw new Error(error.message);
      if (choice) yield choice;
    }
  }
}
// The sampling fields of a request; each of several tries has its own seed
function sampling(conversation, tries = 0) {
  const { stop, thinking, seed: fixed, ...fields } = settings;
  const seed = fixed === undefined ? Math.floor(Math.random() * 2 ** 31) : (fixed + tries) % 2 ** 31;
  const stops = (stop ?? "").split("|").map((text) => text.trim()).filter(Boolean);
  return { model: conversation.model, seed, ...fields, ...(stops.length ? { stop: stops } : {}) };
}

// ---- conversations
const modelOf = (conversation) => models.find((model) => model.id === conversation.model);
const isText = () => modelOf(current)?.chat === false; // a base model continues one text
const freshId = () => Date.now().toString(36) + Math.random().toString(36).slice(2, 8);
const textOf = (node) => node.parts.filter((part) => part.type === "text").map((part) => part.text).join("");
const childrenOf = (conversation, id) => Object.values(conversation.nodes).filter((node) => node.parent === id);
const runningIn = ({ id, nodes }) => [id, ...Object.keys(nodes)].flatMap((each) => running.get(each) ?? []);
// The request field that switches thinking
const template = ({ thinking } = settings) =>
  (thinking ? { chat_template_kwargs: { enable_thinking: thinking === "on" } } : {});

function begin(model = current?.model) {
  current = { id: freshId(), model, system: "", text: "", nodes: {}, chosen: {}, updated: 0 };
}
// The shown nodes, in order
function shownNodes(conversation = current) {
  const nodes = [];
  for (let id = conversation.chosen[""]; id; id = conversation.chosen[id]) nodes.push(conversation.nodes[id]);
  return nodes;
}

function add(conversation, parent, role, text, more = {}) {
  const node = { id: freshId(), parent, role, parts: text ? [{ type: "text", text }] : [], ...more };
  conversation.chosen[parent] = node.id;
  return (conversation.nodes[node.id] = node);
}

function grow(parts, { type, text }) {
  if (type === "text" && parts.at(-1)?.type === "text") parts.at(-1).text += text;
  else parts.push({ type, text });
}
// A message in the format of chat templates and sft
function message({ role, parts, reasoning }) {
  const content = parts.every((part) => part.type === "text") ? textOf({ parts }) : parts;
  return { role, content, ...(reasoning ? { reasoning_content: reasoning } : {}) };
}

const messages = ({ system }, nodes) =>
  [...(system.trim() ? [{ role: "system", content: system.trim() }] : []), ...nodes.map(message)];
// All messages up to and including a node
const messagesTo = (conversation, node, later = []) =>
  (node ? messagesTo(conversation, conversation.nodes[node.parent], [node, ...later]) : messages(conversation, later));

function title(conversation) {
  const [first] = shownNodes(conversation);
  return (first ? textOf(first) : conversation.text).trim().slice(0, 60) || "New conversation";
}
// A conversation as a record for sft, without an unanswered last question
function record(conversation) {
  const nodes = shownNodes(conversation);
  nodes.length = nodes.findLastIndex((node) => node.role === "assistant") + 1;
  if (conversation.text) return [{ text: conversation.text }];
  return nodes.length ? [{ messages: messages(conversation, nodes) }] : [];
}

function download(name, from) {
  const lines = from.flatMap(record).map((each) => `${JSON.stringify(each)}\n`);
  if (!lines.length) return complain("There is nothing to export yet.");
  const href = URL.createObjectURL(new Blob(lines));
  make("a", { href, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(href), 1000);
}

function copy(text) {
  const copied = navigator.clipboard?.writeText(text) ?? Promise.reject();
  copied.then(() => say("Copied"), () => complain("Browsers allow pages to copy only over https and on localhost."));
}

// ---- answers
// Run `work`, which generates text for a node or conversation; stopping it keeps the text so far
async function write(id, work) {
  const controller = new AbortController();
  running.set(id, controller);
  complain("");
  render();
  say("The model is writing");
  await work(controller.signal).catch((error) => { if (error.name !== "AbortError") complain(reason(error)); });
  running.delete(id);
}

function settle(conversation, text) {
  if (!conversation.gone) keep(conversation);
  if (conversation !== current) return;
  say(text);
  render();
}
// Generate an answer; remove it if it failed before its first text
async function writeAnswer(conversation, node, work) {
  await write(node.id, work);
  if (node.parts.length || node.reasoning || node.finish) node.finish ??= "stopped";
  else {
    delete conversation.nodes[node.id];
    conversation.chosen[node.parent] = childrenOf(conversation, node.parent).at(-1)?.id;
  }
  settle(conversation, textOf(node) || "No answer");
}
// Stream an answer; keep its token ids, because its text may be tokenized differently
async function stream(node, path, body, signal) {
  for await (const { text, delta = { content: text }, ...choice } of choices(path, body, signal)) {
    node.ids.push(...(choice.token_ids ?? []));
    if (delta.reasoning_content) node.reasoning = (node.reasoning ?? "") + delta.reasoning_content;
    if (delta.content) grow(node.parts, { type: "text", text: delta.content });
    for (const part of delta.content_parts ?? []) grow(node.parts, part);
    node.finish = choice.finish_reason ?? undefined;
    paint(node);
  }
}
// Start an answer to `parent`; return its node and a promise that resolves when it ends
function answer(parent) {
  const conversation = current;
  const body = sampling(conversation, childrenOf(conversation, parent.id).length), { seed, model, ...used } = body;
  const node = add(conversation, parent.id, "assistant", "", { seed, model, settings: used, ids: [] });
  Object.assign(body, template(), { messages: messagesTo(conversation, parent), return_token_ids: true });
  return { node, ended: writeAnswer(conversation, node, (signal) => stream(node, "/v1/chat/completions", body, signal)) };
}
// Generate two answers to `parent`, or one next to `first`, for a person to compare
async function compare(parent, first) {
  const conversation = current;
  pair = { parent: parent.id, nodes: [] };
  const two = [first ? { node: first } : answer(parent), answer(parent)];
  pair.nodes = two.map(({ node }) => node);
  render();
  await Promise.all(two.map(({ ended }) => ended));
  if (current !== conversation || !pair) return;
  if (!pair.nodes.every((node) => conversation.nodes[node.id])) pair = null; // one of them failed
  render();
  if (pair) $("judge").querySelector("button").focus();
}

function ask(text, parent = shownNodes().at(-1)?.id ?? "") {
  const node = add(current, parent, "user", text);
  keep(current);
  if (collecting && $("two").checked) compare(node);
  else answer(node);
}
// Continue the text from its end, or from the token ids in `prompt`
async function continueText(prompt) {
  const conversation = current, before = conversation.text;
  conversation.before = before;
  await write(conversation.id, async (signal) => {
    const body = { max_tokens: 100, ...sampling(conversation), prompt: prompt ?? before };
    for await (const { text } of choices("/v1/completions", body, signal)) {
      conversation.text += text;
      if (conversation === current) $("paper").value = conversation.text;
    }
  });
  settle(conversation, conversation.text.slice(before.length));
}

// ---- drawing
// Redraw a growing answer, and scroll along if its end is visible
function paint(node) {
  const body = document.querySelector(`[data-node="${node.id}"] .body`), chat = $("chat");
  const low = chat.scrollHeight - chat.scrollTop - chat.clientHeight < 80;
  if (body) fill(body, node);
  if (low) chat.scrollTop = chat.scrollHeight;
}
// Draw a text with fenced code blocks; of a very long one only the beginning
function drawText(text) {
  if (text.length > MOST_SHOWN) {
    const rest = button(`Show ${(text.length - MOST_SHOWN).toLocaleString()} more characters`,
      () => rest.replaceWith(text.slice(MOST_SHOWN)), "plain");
    return prose(text.slice(0, MOST_SHOWN), rest);
  }
  const pieces = text.split(/^```[^\n`]*\n([\s\S]*?)^```[^\S\n]*$\n?/m); // code at odd places
  return prose(...pieces.map((piece, at) => (at % 2 ? make("pre", {}, make("code", {}, piece)) : piece)));
}

function fill(body, { id, parts, reasoning, finish }) {
  const drawn = parts.map(({ type, text }) => (type === "text" ? drawText(text) : make("div", { className: `call ${type}` },
    make("span", { className: "tool" }, type), make("code", { dir: "auto" }, text))));
  if (reasoning) {
    const open = body.querySelector("details")?.open ?? false;
    drawn.unshift(make("details", { open }, make("summary", {}, "Thoughts"), drawText(reasoning)));
  }
  if (running.has(id) && !drawn.length) drawn.push(make("span", { className: "caret" }));
  if (finish === "length") drawn.push(hint("Cut at the token limit."));
  if (finish === "stopped") drawn.push(hint("Stopped."));
  body.replaceChildren(...drawn);
}

function drawTurn(node) {
  const mine = node.role === "user", parent = current.nodes[node.parent];
  const body = make("div", { className: "body" }), tools = make("div", { className: "tools" });
  const name = make("h2", { className: "unseen" }, mine ? "You" : "Assistant");
  const item = make("li", { className: `turn ${node.role}`, data: { node: node.id } }, name, body);
  fill(body, node);
  if (running.has(node.id)) return item;
  const conversation = current, branches = childrenOf(current, node.parent), count = branches.length;
  const at = branches.indexOf(node), change = () => { keep(conversation); render(); };
  const step = (by) => { current.chosen[node.parent] = branches[(at + by + count) % count].id; change(); };
  const thumb = async (better) => {
    if (await collect("thumb", conversation, parent, [node], { better })) node.thumb = better;
    change();
  };
  const place = make("span", { className: "count", title: `Branch ${at + 1} of ${count}` }, `${at + 1}/${count}`);
  if (count > 1) tools.append(iconButton("left", "Previous branch", () => step(-1)), place,
    iconButton("right", "Next branch", () => step(1)));
  tools.append(iconButton("copy", mine ? "Copy the message" : "Copy the answer", () => copy(textOf(node))));
  if (!mine) tools.append(iconButton("again", "Another answer", () => answer(parent)));
  else if (!childrenOf(current, node.id).length) tools.append(iconButton("again", "Ask again", () => answer(node)));
  tools.append(iconButton("edit", mine ? "Edit in a new branch" : "Rewrite the answer", () => edit(node)));
  if (node.model && collecting) tools.append(iconButton("pair", "Compare with another answer", () => compare(parent, node)),
    iconButton("up", "Good answer", () => thumb(1), { pressed: node.thumb === 1 }),
    iconButton("down", "Bad answer", () => thumb(0), { pressed: node.thumb === 0 }));
  item.append(tools);
  return item;
}

function render() {
  const focus = document.activeElement?.closest(".tools button"); // restored on the redrawn button
  const place = focus && [...$("turns").children].indexOf(focus.closest("li"));
  const nodes = shownNodes(), judged = nodes.findIndex((node) => node.id === pair?.parent);
  if (judged < 0) pair = null; // another branch was selected
  else nodes.length = judged + 1;
  const text = isText(), busy = runningIn(current).length > 0;
  document.body.classList.toggle("continues", text);
  $("model").value = current.model ?? "";
  if ($("paper").value !== current.text) $("paper").value = current.text;
  $("turns").replaceChildren(...nodes.map(drawTurn));
  if (pair) drawPair();
  const hidden = { empty: text || nodes.length, paper: !text, judge: !pair, chat: showsTokens, seen: !showsTokens,
    labelling: !collecting || text, stop: !busy, send: busy, again: !text || busy || current.before === undefined };
  for (const [id, value] of Object.entries(hidden)) $(id).hidden = value;
  for (const id of ["as-text", "as-tokens"]) $(id).setAttribute("aria-pressed", showsTokens === (id === "as-tokens"));
  $("keys").textContent = text ? "Ctrl + Enter continues the text" : "Enter sends, Shift + Enter begins a new line";
  drawList();
  if (showsTokens) see(nodes, busy).catch((error) => complain(reason(error)));
  else closeOdds();
  if (focus) $("turns").children[place]?.querySelector(`[data-does="${focus.dataset.does}"]`)?.focus();
  else if (!showsTokens) $("chat").scrollTop = $("chat").scrollHeight;
}

function turnTo(conversation) {
  [current, pair] = [conversation, null];
  if (!modelOf(current)) current.model = (models.find((model) => model.chat === !current.text) ?? models[0])?.id;
  render();
}

function drawList() {
  const newestFirst = [...conversations.values()].sort((one, other) => other.updated - one.updated);
  $("list").replaceChildren(...newestFirst.map((conversation) => {
    const open = button("", () => { turnTo(conversation); showSide(false); }, "wide");
    open.append(make("bdi", {}, title(conversation)));
    if (conversation === current) open.setAttribute("aria-current", "page");
    return make("li", {}, open, iconButton("bin", `Delete: ${title(conversation)}`, () => remove(conversation)));
  }));
}

function remove(conversation) {
  if (!confirm("Delete this conversation? It exists only in this browser.")) return;
  conversation.gone = true;
  runningIn(conversation).forEach((controller) => controller.abort());
  conversations.delete(conversation.id);
  store("chats", [...conversations.keys()]);
  store(`chat.${conversation.id}`, null);
  if (conversation === current) begin();
  render();
}

function showSide(on) {
  document.body.classList.toggle("listing", on);
  $("open-side").setAttribute("aria-expanded", on);
  (on ? $("close-side") : isText() ? $("paper") : $("text")).focus();
}

// ---- the conversation as the model sees it
async function see(nodes, busy) {
  const conversation = current, { model } = conversation, shown = messages(conversation, nodes), last = nodes.at(-1);
  const own = last?.model === model && last.parts.every(({ type }) => type === "text") ? last.ids ?? [] : [];
  const before = own.length ? shown.slice(0, -1) : shown;
  const chat = { messages: before, add_generation_prompt: before.at(-1)?.role !== "assistant", ...template() };
  const body = isText() ? { prompt: conversation.text } : chat, key = JSON.stringify([model, body, own]);
  if (busy || seen?.key === key) return;
  closeOdds();
  seen = null;
  $("tokens").replaceChildren();
  $("seen-about").textContent = nodes.length || conversation.text ? "" : "The conversation is empty.";
  if (!nodes.length && !conversation.text) return;
  const cut = await json("/tokenize", { model, ...body, return_token_strs: true });
  if (own.length) {
    const answered = { tokens: own, trained: own.map(() => true), ...await detokenize(model, own) };
    for (const name of ["tokens", "token_strs", "special", "trained"]) cut[name].push(...answered[name]);
    cut.turn_ends.push(cut.tokens.length);
  }
  const score = { echo: true, logprobs: 10, max_tokens: 0, return_tokens_as_token_ids: true };
  const { choices: [{ logprobs }] } = await json("/v1/completions", { model, prompt: cut.tokens, ...score });
  if (conversation !== current || !showsTokens) return;
  const scored = { logprobs: logprobs.token_logprobs, tops: logprobs.top_logprobs };
  seen = { key, conversation, nodes, turns: shown.length, trained: [], turn_ends: [], ...scored, ...cut };
  drawTokens();
}

function drawTokens() {
  const { tokens, token_strs: texts, special, trained, turn_ends: ends, logprobs, max_model_len: most } = seen;
  $("tokens").replaceChildren(...tokens.flatMap((_, at) => {
    const logprob = logprobs[at], name = special[at] ? texts[at] : visible(texts[at]);
    const shade = SHADES.findIndex((least) => Math.exp(logprob) >= least);
    const kinds = ["token", logprob === null ? "first" : `p${shade < 0 ? SHADES.length : shade}`];
    if (special[at]) kinds.push("special");
    if (trained[at]) kinds.push("learnt");
    const share = logprob === null ? "no probability" : percent(logprob), aria = { label: `${name}, ${share}` };
    const properties = { type: "button", className: kinds.join(" "), tabIndex: at ? -1 : 0, title: share };
    const token = make("button", { ...properties, data: { at }, aria }, name);
    if (ends.includes(at + 1)) return [token, make("span", { className: "end" })];
    return texts[at].includes("\n") && !special[at] ? [token, make("br")] : [token];
  }));
  const scored = logprobs.filter((logprob) => logprob !== null);
  const bits = scored.reduce((sum, logprob) => sum - logprob / Math.LN2, 0) / (scored.length || 1);
  $("seen-about").textContent = `${tokens.length.toLocaleString()} of ${most.toLocaleString()} tokens, `
    + `${bits.toFixed(2)} bits each. Select one to see its alternatives.`;
}

async function showOdds(at) {
  const { conversation, tokens, special, token_strs: texts, trained, logprobs, tops } = seen;
  const logprob = logprobs[at], free = isText() || trained[at], name = special[at] ? texts[at] : visible(texts[at]);
  const listed = Object.entries(tops[at] ?? {}).map(([named, odds]) => ({ id: Number(named.split(":")[1]), odds }))
    .sort((one, other) => other.odds - one.odds);
  if (listed.length && !listed.some(({ id }) => id === tokens[at])) listed.push({ id: tokens[at], odds: logprob });
  const strings = listed.length ? await detokenize(conversation.model, listed.map(({ id }) => id)) : {};
  closeOdds();
  $("tokens").querySelector(`[data-at="${at}"]`).setAttribute("aria-expanded", "true");
  $("odds-of").textContent = name;
  $("odds-about").textContent = logprob === null ? `Token ${tokens[at]}, the first, so without a probability.`
    : `Token ${tokens[at]}, ${percent(logprob)}, ${(-logprob / Math.LN2).toFixed(1)} bits. `
      + (free ? "Choose another to continue from there." : "Not written by the model; these are its predictions.");
  $("odds-list").replaceChildren(...listed.map(({ id, odds }, place) => {
    const text = visible(strings.token_strs[place]), bar = make("i");
    bar.style.setProperty("--share", Math.exp(odds));
    const aria = { label: `${text}, ${percent(odds)}`, ...(id === tokens[at] ? { current: true } : {}) };
    const properties = { type: "button", disabled: !free, onclick: () => branch(at, id), aria };
    return make("li", {}, make("button", properties, make("bdi", {}, text), bar, make("span", {}, percent(odds))));
  }));
  $("odds").hidden = false;
  ($("odds-list").querySelector("button:enabled") ?? $("close-odds")).focus();
}

function closeOdds() {
  if ($("odds").hidden) return;
  $("odds").hidden = true;
  const token = $("tokens").querySelector("[aria-expanded]");
  token?.removeAttribute("aria-expanded");
  token?.focus();
}
// Parse an assistant's tokens into reasoning and message parts: texts, tool calls, results
async function readTokens(model, tokens) {
  const { token_strs: texts, special } = await detokenize(model, tokens), parts = [];
  let type = "text", from = 0;
  for (let at = 0; at <= tokens.length; at += 1) {
    if (at < tokens.length && !special[at]) continue;
    if (at > from) grow(parts, { type, text: (await detokenize(model, tokens.slice(from, at))).prompt });
    const [, call, side] = CALLS.exec(texts[at] ?? "") ?? [];
    type = side === "start" ? call : "text";
    from = at + 1;
  }
  const [thoughts, reasoning] = THOUGHTS.exec(parts[0]?.text ?? "") ?? [""];
  if (thoughts) parts[0].text = parts[0].text.slice(thoughts.length);
  return { parts, reasoning };
}
// Continue from another token at a position: a text in place, an answer in a new branch
async function branch(at, id) {
  const { conversation, nodes, turns, tokens, special, trained, turn_ends: ends } = seen, { model } = conversation;
  const prompt = [...tokens.slice(0, at), id];
  closeOdds();
  showsTokens = false;
  if (isText()) {
    conversation.text = (await detokenize(model, prompt.filter((_, place) => !special[place] || place === at))).prompt;
    return continueText(prompt);
  }
  const turn = ends.filter((end) => end <= at).length;
  const answered = nodes[turn - (turns - nodes.length)]; // a system message has no node
  const written = prompt.slice(trained.indexOf(true, ends[turn - 1] ?? 0));
  const { seed, model: _, ...used } = sampling(conversation);
  const node = add(conversation, answered.parent, "assistant", "", { seed, model, settings: used, ids: written });
  const body = { max_tokens: modelOf(conversation).max_model_len, ...used, model, seed, prompt, return_token_ids: true };
  await writeAnswer(conversation, node, async (signal) => {
    Object.assign(node, await readTokens(model, written));
    paint(node);
    if (modelOf(conversation).end_ids.includes(id)) return void (node.finish = "stop");
    await stream(node, "/v1/completions", body, signal);
    Object.assign(node, await readTokens(model, written)); // tool calls, and characters split between tokens
  });
}

function moveAmongTokens(event) {
  const all = [...$("tokens").querySelectorAll(".token")], at = all.indexOf(event.target);
  const { offsetLeft: left, offsetTop: top } = event.target;
  const above = ({ offsetLeft, offsetTop }) => offsetTop < top - 4 && offsetLeft <= left;
  const below = ({ offsetLeft, offsetTop, offsetWidth }) => offsetTop > top + 4 && offsetLeft + offsetWidth > left;
  const moves = { ArrowRight: () => all[at + 1], ArrowLeft: () => all[at - 1], Home: () => all[0], End: () => all.at(-1),
    ArrowDown: () => all.slice(at).find(below), ArrowUp: () => all.slice(0, at).findLast(above) };
  const token = at < 0 ? null : moves[event.key]?.();
  if (!token) return;
  event.preventDefault();
  [event.target.tabIndex, token.tabIndex] = [-1, 0];
  token.focus();
}

// ---- tokenizing any text
let cutLater = null, cutting = new AbortController();
async function cutText() {
  cutting.abort();
  cutting = new AbortController();
  const { signal } = cutting, prompt = $("cut-text").value, length = [...prompt].length;
  await Promise.all([...$("cuts").children].map(async (column) => {
    const model = column.querySelector("select").value, [, about, pieces] = column.children;
    const body = { model, prompt, add_special_tokens: false, return_token_strs: true };
    const cut = prompt ? json("/tokenize", body, signal) : Promise.resolve({ tokens: [], token_strs: [] });
    await cut.then(({ tokens, token_strs: texts }) => {
      const each = tokens.length ? `, ${(length / tokens.length).toFixed(2)} characters each` : "";
      const rest = tokens.length > MOST_CUT ? `; the first ${MOST_CUT.toLocaleString()} are shown` : "";
      about.textContent = `${tokens.length.toLocaleString()} tokens${each}${rest}`;
      pieces.replaceChildren(...texts.slice(0, MOST_CUT).flatMap((text, at) => {
        const piece = make("span", { className: `piece c${at % 4}`, title: `token ${tokens[at]}` }, visible(text));
        return text.includes("\n") ? [piece, make("br")] : [piece];
      }));
    }).catch((error) => { if (error.name !== "AbortError") about.textContent = reason(error); });
  }));
}

function openCut() {
  const names = models.map((model) => model.id), other = names.find((name) => name !== current.model);
  $("cuts").replaceChildren(...[current.model, other].filter(Boolean).map((picked) => {
    const options = names.map((name) => make("option", { selected: name === picked }, name));
    const select = make("select", { onchange: cutText, aria: { label: "Tokenizer of" } }, ...options);
    return make("section", {}, select, hint(""), make("div", { className: "pieces" }));
  }));
  $("cut").showModal();
  cutText();
}

// ---- labelling
// Send a judgement of answers to the conversation up to `parent`; return true if it was saved
async function collect(kind, conversation, parent, nodes, judgement) {
  const [{ model = conversation.model, settings: used = {} }] = nodes;
  const body = { kind, model, messages: messagesTo(conversation, parent), answers: nodes.map(message),
    labeller: $("labeller").value.trim() || null, seeds: nodes.map((node) => node.seed ?? null), settings: used };
  const saved = request("/collect", { ...body, ...judgement }).then(() => { say("Judgement saved"); return true; });
  return saved.catch((error) => complain(`Judgement not saved: ${reason(error)}`));
}

function drawPair() {
  $("pair").replaceChildren(...pair.nodes.map((node, at) => {
    const body = make("div", { className: "body" });
    fill(body, node);
    return make("article", { data: { node: node.id }, aria: { label: at ? "Right answer" : "Left answer" } }, body);
  }));
  const busy = !pair.nodes.length || pair.nodes.some((node) => running.has(node.id));
  for (const each of document.querySelectorAll("[data-better]")) each.disabled = busy;
}
// Judge the pair: 0 or 1 is better, null is a tie, undefined skips
async function judge(better) {
  const conversation = current, { parent, nodes } = pair, about = conversation.nodes[parent];
  if (better !== undefined && !(await collect("comparison", conversation, about, nodes, { better }))) return;
  conversation.chosen[parent] = nodes[better ?? 0].id;
  pair = null;
  keep(conversation);
  render();
  $("text").focus();
}
// Let a person edit a question, which is then asked, or rewrite an answer
function edit(node) {
  const conversation = current, old = textOf(node), mine = node.role === "user", dialog = $("edit");
  $("edit-title").textContent = mine ? "Your message" : "The ideal answer";
  $("edited").value = old;
  $("save").textContent = mine ? "Send" : "Save";
  dialog.classList.toggle("mine", mine);
  $("save").onclick = async () => {
    const text = $("edited").value.trim(), parent = conversation.nodes[node.parent];
    if (!text || (!mine && text === old)) return dialog.close();
    if (!mine && collecting && !(await collect("rewrite", conversation, parent, [node], { rewritten: text }))) return;
    dialog.close();
    if (mine) return ask(text, node.parent);
    add(conversation, node.parent, "assistant", text, { finish: "stop" });
    keep(conversation);
    render();
  };
  dialog.showModal();
}
// Show the labelling guide with its headings
function drawGuide(markdown) {
  const drawn = prose(...markdown.trim().split(/^(#+ .*)\n+/m).map((text, at) => (at % 2 ? make("h3", {}, text.replace(/^#+ /, "")) : text)));
  for (const place of document.querySelectorAll(".guide")) place.replaceChildren(drawn.cloneNode(true));
  $("open-guide").hidden = false;
}

// ---- settings and startup
const fields = () => [...$("settings").querySelectorAll("[name]")];

function openSettings(focus) {
  for (const field of fields()) field.value = settings[field.name] ?? "";
  $("system").value = current.system;
  if (!$("settings").open) $("settings").showModal();
  if (focus) fields().find((field) => field.name === focus).focus();
}

function closeSettings() {
  const filled = fields().filter((field) => field.value !== "" && field.validity.valid);
  const values = filled.map(({ name, type, value }) => [name, type === "number" ? Number(value) : value]);
  const { key, ...others } = Object.fromEntries(values);
  store("settings", settings = others);
  current.system = $("system").value;
  if (shownNodes().length) keep(current);
  if (key) store("key", key, () => sessionStorage);
  (key ? start : render)();
}

function listen() {
  const clicks = {
    "new": () => { begin(); render(); showSide(false); },
    "open-side": () => showSide(true), "close-side": () => showSide(false),
    "open-cut": openCut, "open-guide": () => $("guide").showModal(), "open-settings": () => openSettings(),
    "as-text": () => { showsTokens = false; render(); }, "as-tokens": () => { showsTokens = true; render(); },
    "export": () => download("conversation.jsonl", [current]),
    "export-all": () => download("conversations.jsonl", [...conversations.values()]),
    "defaults": () => { for (const field of [...fields(), $("system")]) field.value = ""; },
    "stop": () => runningIn(current).forEach((controller) => controller.abort()),
    "again": () => { current.text = current.before; continueText(); },
    "skip": () => judge(), "dismiss": () => complain(""), "close-odds": closeOdds,
  };
  for (const [id, work] of Object.entries(clicks)) $(id).onclick = work;
  for (const each of document.querySelectorAll("[data-better]")) each.onclick = () => judge(JSON.parse(each.dataset.better));
  for (const each of document.querySelectorAll("[data-close]")) each.onclick = () => each.closest("dialog").close();
  $("settings").onclose = closeSettings;
  $("model").onchange = () => {
    const used = shownNodes().length || current.text, before = isText();
    current.model = $("model").value;
    if (used && before !== isText()) begin(); // a conversation cannot become a text to continue
    render();
  };
  for (const area of [$("text"), $("paper")]) area.onkeydown = (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing || (isText() && !event.ctrlKey)) return;
    event.preventDefault();
    $("ask").requestSubmit();
  };
  $("ask").onsubmit = (event) => {
    event.preventDefault();
    const text = $("text").value.trim();
    if ($("send").hidden || pair || !models.length) return;
    if (isText()) return continueText();
    if (text) ask(text);
    $("text").value = "";
  };
  $("paper").oninput = () => { current.text = $("paper").value; keep(current); drawList(); };
  $("labelling").onchange = () => { store("labeller", $("labeller").value); store("two", $("two").checked); };
  $("tokens").onkeydown = moveAmongTokens;
  $("tokens").onclick = ({ target: { dataset } }) => {
    if (dataset.at) showOdds(Number(dataset.at)).catch((error) => complain(reason(error)));
  };
  $("odds").onkeydown = (event) => {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key], all = [...$("odds-list").querySelectorAll("button:enabled")];
    if (!step || !all.length) return;
    event.preventDefault();
    all.at((all.indexOf(document.activeElement) + step) % all.length).focus();
  };
  $("cut-text").oninput = () => { clearTimeout(cutLater); cutLater = setTimeout(cutText, 150); };
  document.onkeydown = ({ key, target }) => {
    if (key !== "Escape" || target.closest("dialog")) return;
    (document.body.classList.contains("listing") ? $("close-side") : !$("odds").hidden ? $("close-odds") : $("stop")).click();
  };
  window.onstorage = () => { loadConversations(); drawList(); }; // another tab
}

async function start() {
  complain("");
  ({ data: models } = await json("/v1/models").catch((error) => { complain(reason(error)); return { data: [] }; }));
  collecting = models.some((model) => model.collect);
  $("model").replaceChildren(...models.map((model) => make("option", {}, model.id)));
  turnTo(current);
  if (models.some((model) => model.guide)) drawGuide(await (await request("/guide")).text());
}

settings = stored("settings", {});
[$("labeller").value, $("two").checked] = [stored("labeller", ""), stored("two", false)];
for (const work of [loadConversations, begin, listen, render, start]) work();
