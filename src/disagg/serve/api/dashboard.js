"use strict";
/* The page: asks the server once a second and draws what it said. */

const REFRESH_MS = 1000, TIMEOUT_MS = 5000, PAGE = 1000;
const KEY_NAME = "disagg-api-key";
const ROLES = ["prefill", "decode", "colocated"];

const store = new Store();
const view = {
  slo: { ttft: null, tpot: null }, windowS: 60, early: false, paused: false, pointed: false, lastSeen: null,
  unlocked: null,  /* while the key is asked for: what goes on once there is one */
};

/* Asking ------------------------------------------------------------------------------------------------------- */

class Locked extends Error {}

async function ask(path) {
  const key = sessionStorage.getItem(KEY_NAME);
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  const response = await fetch(path, { headers, signal: AbortSignal.timeout(TIMEOUT_MS), cache: "no-store" });
  if (response.status === 401) throw new Locked();
  if (!response.ok) throw new Error(`the server answers ${response.status}`);
  return response.json();
}

async function refresh() {
  try {
    store.takeStatus(await ask("/status"));
    for (let page = null; page === null || page.requests.length === PAGE;) {
      page = await ask(`/requests?after=${store.after}&limit=${PAGE}`);
      store.takeRequests(page);
    }
    view.lastSeen = Date.now();
    showAnswered();
  } catch (error) {
    if (error instanceof Locked) showLocked();
    else showUnreachable(error instanceof TypeError || error.name === "TimeoutError" ? "The server does not answer" : `Trouble: ${error.message}`);
  }
}

async function run() {
  for (;;) {
    const begun = performance.now();
    await refresh();
    if (!$("key-form").hidden) await new Promise(resolve => { view.unlocked = resolve; });
    await new Promise(resolve => setTimeout(resolve, Math.max(100, REFRESH_MS - (performance.now() - begun))));
  }
}

/* How the server is -------------------------------------------------------------------------------------------- */

function showState(kind, words) {
  $("state").className = `pill ${kind}`;
  if ($("state").textContent !== words) $("state").textContent = words;
}

function showTrouble(words) {
  $("trouble").hidden = !words;
  if (words && $("trouble").textContent !== words) $("trouble").textContent = words;
}

function showLocked() {
  $("key-wrong").hidden = !sessionStorage.getItem(KEY_NAME);
  $("key-form").hidden = false;
  $("live").hidden = true;
  showTrouble("");
  showState("wait", "locked");
}

function showUnreachable(words) {
  const since = view.lastSeen ? ` What you see is ${number((Date.now() - view.lastSeen) / 1000)} s old.` : "";
  showTrouble(`${words}: trying again every second.${since}`);
  showState("bad", "unreachable");
  $("live").classList.add("stale");
}

function showAnswered() {
  const status = store.status, down = status.instances.filter(one => one.state !== "ready");
  $("key-form").hidden = true;
  $("live").hidden = false;
  $("live").classList.remove("stale");
  $("model").textContent = `${status.model} · version ${status.version}`;
  if (!status.ready) showState("bad", "not ready");
  else if (down.length) showState("wait", `ready, ${down.length} of ${status.instances.length} instances are not`);
  else showState("good", "ready");
  showTrouble(status.ready ? "" : `No request can be served now: ${status.detail}`);
  if (!view.paused) draw();
}

/* Drawing ------------------------------------------------------------------------------------------------------ */

function draw() {
  const requests = store.requestsOf(view.windowS);
  drawTiles(requests);
  drawInstances();
  drawLatency("ttft", requests);
  drawLatency("tpot", requests);
  if (!view.pointed) drawLast();
}

function drawSpark(host, points, colour) {
  $(host).replaceChildren(sparkline(points, store.begin(view.windowS), store.now, colour));
  const tile = $(host).parentElement;
  withTip(tile, () => spanTip(tile.querySelector("span").firstChild.textContent, points));
}

function drawTiles(requests) {
  const samples = store.samplesOf(view.windowS), ended = store.endedPerSecond(store.begin(view.windowS));
  const points = field => samples.filter(one => one.seconds > 0).map(one => ({ at: one.at, value: one[field] }));
  const last = samples.at(-1);
  $("request-rate").textContent = number(store.requestsOf(10).length / 10);
  $("token-rate").textContent = number(store.recent(one => one.decodeRate));
  $("prompt-rate").textContent = number(store.recent(one => one.prefillRate));
  $("under-way").textContent = number(last.underWay);
  $("running").textContent = `(${number(last.running)} in a batch)`;
  $("waiting").textContent = number(last.waiting);
  drawSpark("request-spark", ended, "grey");
  drawSpark("token-spark", points("decodeRate"), "decode");
  drawSpark("prompt-spark", points("prefillRate"), "prefill");
  drawSpark("under-way-spark", points("underWay"), "grey");
  drawSpark("waiting-spark", points("waiting"), "grey");
  drawAttainment(requests);
}

function drawAttainment(requests) {
  const isSet = view.slo.ttft !== null || view.slo.tpot !== null;
  const kept = requests.filter(one => meets(one, view.slo)).length, share = kept / requests.length;
  const isKnown = isSet && requests.length > 0;
  $("attainment").textContent = isKnown ? `${number(Math.floor(share * 1000) / 10)}%` : "–";
  $("attainment-bar").style.width = isKnown ? `${share * 100}%` : "0";
  $("attainment-tile").classList.toggle("low", isKnown && share < 0.9);
  $("attainment-words").textContent = !isSet ? "set objectives above" : `${number(kept)} of ${number(requests.length)} requests`;
}

function fact(value, name, plural = name) {
  return element("span", "", element("b", "", number(value)), ` ${value === 1 ? name : plural}`);
}

function card(one) {
  const up = one.state === "ready", isDown = one.state === "lost" || one.state === "gone", kind = up ? "good" : isDown ? "bad" : "wait";
  const rate = field => store.recent(sample => sample.instances.get(one.instance)?.[field] ?? 0);
  const facts = element("div", "facts", fact(one.num_running, "running"), fact(one.num_waiting, "waiting"));
  if (one.role === "prefill") facts.append(fact(one.num_leases, "lease", "leases"));
  if (one.role !== "decode") facts.append(fact(rate("prefillRate"), "prompt tok/s"));
  if (one.role !== "prefill") facts.append(fact(rate("decodeRate"), "output tok/s"));
  const minor = [`${number(rate("stepRate"))} steps/s`];
  if (one.num_prefix_queries_total) {
    const share = (tokens) => `${number(100 * tokens / one.num_prefix_queries_total)}%`;
    minor.push(`${share(one.num_prefix_hits_total)} of prompt tokens cached`);
    if (one.num_prefix_pulled_total) minor.push(`${share(one.num_prefix_pulled_total)} pulled from others`);
    if (one.num_prefix_from_host_total) minor.push(`${share(one.num_prefix_from_host_total)} read from host memory`);
    if (one.num_prefix_loaded_total) minor.push(`${share(one.num_prefix_loaded_total)} read from disk`);
  }
  if (one.blocks_on_host) minor.push(`${number(one.blocks_on_host)} blocks in host memory`);
  if (one.blocks_on_disk) minor.push(`${number(one.blocks_on_disk)} blocks on disk`);
  if (one.num_preemptions_total) minor.push(`${number(one.num_preemptions_total)} computed again`);
  if (one.num_leases_expired_total) minor.push(`${number(one.num_leases_expired_total)} leases expired`);
  if (one.num_restarts) minor.push(`died ${one.num_restarts === 1 ? "once" : `${one.num_restarts} times`}`);
  facts.append(element("span", "minor", minor.join(" · ")));
  const field = one.role === "prefill" ? "prefillRate" : "decodeRate";
  const points = store.samplesOf(view.windowS).filter(sample => sample.seconds > 0)
    .map(sample => ({ at: sample.at, value: sample.instances.get(one.instance)?.[field] ?? 0 }));
  const spark = sparkline(points, store.begin(view.windowS), store.now, one.role);
  const where = one.pid === null ? "" : `${one.kernel_backend} on ${one.device} · pid ${one.pid}`;
  const made = element("article", `card ${one.role}${up ? "" : " down"}`,
    element("h3", "", element("span", "", one.instance, element("em", "", where)), element("span", `pill ${kind}`, one.is_leaving ? "leaving" : one.state)));
  if (!up) made.append(element("p", isDown ? "detail bad" : "detail", wordsOf(one)));
  made.append(element("div", "body", facts, spark), ...blocks(one));
  return made;
}

function blocks(one) {
  const total = Object.values(one.blocks).reduce((sum, count) => sum + count, 0);
  const bar = element("div", "kv");
  for (const state of BLOCK_STATES) {
    const part = element("i", `block-${state}`);
    part.style.width = total ? `${(one.blocks[state] ?? 0) / total * 100}%` : "0";
    bar.append(part);
  }
  const held = total - (one.blocks.free ?? 0) - (one.blocks.cached ?? 0);
  const size = one.kv_bytes ? ` · ${bytes(one.kv_bytes)}` : "";
  const words = total ? `KV blocks: ${number(held)} held, ${number(one.blocks.cached)} cached of ${number(total)}${size}` : "no KV pool yet";
  const row = state => [`block-${state}`, state, number(one.blocks[state] ?? 0), `${number((one.blocks[state] ?? 0) / total * 100)}%`];
  withTip(bar, () => [element("b", "", `${one.instance}: KV blocks`), tipTable(BLOCK_STATES.map(row))]);
  return [bar, element("div", "small", words)];
}

function arrow() {
  const rate = store.recent(one => one.handOverRate), byteRate = store.recent(one => one.byteRate);
  const seconds = store.recent(one => one.pullSecondsRate, view.windowS), pulls = store.recent(one => one.handOverRate, view.windowS);
  const totals = store.status.hand_overs;
  const made = element("div", "arrow", element("span", "", element("b", "", number(rate)), "hand-overs / s"),
    svg("svg", { viewBox: "0 0 160 16", "aria-hidden": "true", class: rate > 0 ? "" : "idle" },
      svg("path", { class: rate > 0 ? "track busy" : "track", d: "M2 8H148" }), svg("path", { d: "M146 2l10 6-10 6" })),
    element("span", "", `${bytes(byteRate)}/s of KV`), element("span", "", pulls > 0 ? `${latency(seconds / pulls)} each` : `${number(totals.num_total)} so far`));
  if (totals.num_failures_total) made.append(element("span", "failed", ` ${number(totals.num_failures_total)} failed`));
  return made;
}

function drawInstances() {
  const instances = store.status.instances;
  const column = role => {
    const cards = instances.filter(one => one.role === role).map(card);
    return element("div", `column${cards.length > 4 ? " many" : ""}`, ...cards);
  };
  const has = role => instances.some(one => one.role === role);
  const split = has("prefill") || has("decode"), children = split ? [column("prefill"), arrow(), column("decode")] : [];
  if (has("colocated")) {
    const made = column("colocated");
    made.classList.add("wide");
    children.push(made);
  }
  $("flow").className = split ? "flow split" : "flow";
  $("flow").replaceChildren(...children);
  $("decisions").replaceChildren(...decisionsOf(store.status).map(([who, words]) => element("p", "", element("b", "", who), ` ${words}`)));
}

function drawLatency(field, requests) {
  const limit = view.slo[field], figures = percentiles(requests, `${field}_s`);
  const figure = (name, value) => element("div", limit === null || !figures.count ? "" : value <= limit ? "kept" : "missed",
    element("b", "", latency(value)), name);
  $(`${field}-figures`).replaceChildren(figure("P50", figures.p50), figure("P90", figures.p90), figure("P99", figures.p99));
  $(`${field}-count`).textContent = `of ${number(figures.count)} requests`;
  const isMet = one => limit === null || one[`${field}_s`] <= limit;
  scatter($(`${field}-chart`), requests, `${field}_s`, limit, store.begin(view.windowS), store.now, isMet, requestTip);
}

/* The last requests -------------------------------------------------------------------------------------------- */

function tipTable(rows) {
  const cells = row => [element("td", "", element("i", row[0]), row[1]), ...row.slice(2).map(words => element("td", "", words))];
  return element("table", "", ...rows.map(row => element("tr", "", ...cells(row))));
}

function requestTip(one) {
  const total = Object.values(one.stages).reduce((sum, seconds) => sum + seconds, 0);
  const rows = STAGES.filter(stage => one.stages[stage.name] > 0)
    .map(stage => [`stage-${stage.name}`, stage.label, latency(one.stages[stage.name]), `${number(one.stages[stage.name] / total * 100)}%`]);
  const nodes = [element("b", "", one.request_id), element("div", "", `${route(one)} · ${one.num_prompt_tokens} prompt tokens` +
    `${one.num_cached_tokens ? ` (${one.num_cached_tokens} cached)` : ""}, ${one.num_output_tokens} generated · ${one.finish_reason}`),
    element("div", "", `TTFT ${latency(one.ttft_s)} · TPOT ${latency(one.tpot_s)} · end to end ${latency(one.e2e_s)}`)];
  if (one.error) nodes.push(element("div", "", one.error));
  return rows.length ? [...nodes, tipTable(rows)] : nodes;
}

function route(one) {
  const [from, to] = [one.prefill_instance, one.decode_instance];
  return !from && !to ? "no instance" : !to || from === to ? from ?? to : `${from ?? "–"} → ${to}`;
}

function drawLast() {
  const stages = view.early ? STAGES.slice(0, NUM_STAGES_TO_SECOND_TOKEN) : STAGES;
  const shown = store.requests.slice(innerWidth < 736 ? -12 : -20).reverse();
  if (!shown.length) { $("last").replaceChildren(element("p", "empty", "no requests yet")); return; }
  const length = one => stages.reduce((sum, stage) => sum + (one.stages[stage.name] ?? 0), lostSeconds(one));
  const scale = Math.max(...shown.map(length), 1e-3);
  const axis = element("div", "axis");
  for (const tick of timeTicks(scale, innerWidth < 736 ? 2 : 5)) {
    const label = element("span", "", tick ? axisLatency(tick) : "0");
    label.style.left = `${tick / scale * 100}%`;
    axis.append(label);
  }
  const head = element("div", "row head", element("span", "id", "request"), element("span", "route", "instances"),
    element("span", "tokens", "prompt + output"), axis, element("span", "figure", "TTFT"), element("span", "figure", "TPOT"), element("span", ""));
  $("last").replaceChildren(head, ...shown.map(one => requestRow(one, stages, scale)));
}

function requestRow(one, stages, scale) {
  const isKept = meets(one, view.slo), over = (value, limit) => limit !== null && value > limit ? " over" : "";
  const row = element("div", "row", element("code", "id", one.request_id.slice(0, 12)), element("span", "route", route(one)),
    element("span", "tokens", `${one.num_prompt_tokens} + ${one.num_output_tokens}`), stageBar(one, stages, scale),
    element("span", `figure${over(one.ttft_s, view.slo.ttft)}`, latency(one.ttft_s)),
    element("span", `figure${over(one.tpot_s, view.slo.tpot)}`, latency(one.tpot_s)),
    element("span", `mark ${isKept ? "kept" : "missed"}`, isKept ? "✓" : "✗"));
  row.tabIndex = 0;
  return withTip(row, () => requestTip(one));
}

function drawLegends() {
  const entry = (kind, words, hint) => {
    const made = element("span", "", element("i", kind), words);
    if (hint) made.title = hint;
    return made;
  };
  $("stages-legend").replaceChildren(...STAGES.map(stage => entry(`stage-${stage.name}`, stage.label, stage.hint)),
    entry("stage-lost", "waited in vain", "until it failed or its client left"));
  $("blocks-legend").replaceChildren("KV blocks:", ...BLOCK_STATES.map(state => entry(`block-${state}`, state)));
}

/* Controls ----------------------------------------------------------------------------------------------------- */

function readObjectives() {
  const query = new URLSearchParams(location.search);
  for (const name of ["ttft", "tpot"]) {
    const limit = parseLatency($(name).value);
    $(name).classList.toggle("wrong", Number.isNaN(limit));
    if (Number.isNaN(limit)) continue;
    view.slo[name] = limit;
    if (limit === null) query.delete(name); else query.set(name, $(name).value.trim());
  }
  if (view.windowS === 60) query.delete("window"); else query.set("window", view.windowS);
  history.replaceState(null, "", query.size ? `?${query}` : location.pathname);
}

function choose(early) {
  view.early = early;
  $("early").setAttribute("aria-pressed", early);
  $("whole").setAttribute("aria-pressed", !early);
  drawLast();
}

function change() {
  view.windowS = Number($("window").value);
  readObjectives();
  if (store.status) draw();
}

function start() {
  const query = new URLSearchParams(location.search);
  for (const name of ["ttft", "tpot", "window"]) if (query.get(name)) $(name).value = query.get(name);
  if (!$("window").value) $("window").value = "60";
  $("controls").addEventListener("submit", event => event.preventDefault());
  $("controls").addEventListener("input", change);
  $("key-form").addEventListener("submit", event => {
    event.preventDefault();
    sessionStorage.setItem(KEY_NAME, $("key").value);
    view.unlocked();
  });
  $("pause").addEventListener("click", () => {
    view.paused = !view.paused;
    $("pause").setAttribute("aria-pressed", view.paused);
    $("pause").textContent = view.paused ? "paused" : "pause";
    if (!view.paused && store.status) draw();
  });
  $("whole").addEventListener("click", () => choose(false));
  $("early").addEventListener("click", () => choose(true));
  $("last").addEventListener("pointerenter", () => { view.pointed = true; $("held").textContent = "held while you point at them"; });
  $("last").addEventListener("pointerleave", () => { view.pointed = false; $("held").textContent = ""; });
  for (const kind of ["pointerover", "focusin"]) document.addEventListener(kind, showTip);
  for (const kind of ["pointerdown", "focusout"]) document.addEventListener(kind, () => { $("tip").hidden = true; });
  drawLegends();
  change();
  run();
}

start();
