"use strict";
/* What the figures are made of: samples of /status, entries of /requests, and pure functions over them. Times are
   seconds of the server's clock, so that neither a slow tab nor a clock that is off bends a rate. */

const LONGEST_WINDOW_S = 900;
const MAX_REQUESTS = 4096;
const COMPLETE = new Set(["stop", "length"]);

/* In order of time; "label" and "hint" say what measure.timeline.Stage says. */
const STAGES = [
  { name: "queue_prefill", label: "queue for prefill", hint: "arrival to the first prefill step" },
  { name: "prefill", label: "prefill", hint: "to the first token" },
  { name: "hand_over_control", label: "offer on its way", hint: "until the decode instance knows of it" },
  { name: "hand_over_wait", label: "wait for hand-over", hint: "until the decode instance has room" },
  { name: "hand_over", label: "hand-over", hint: "the pull of the KV blocks" },
  { name: "queue_decode", label: "queue for decode", hint: "blocks there, first decode step not yet begun" },
  { name: "first_decode", label: "second token", hint: "the first decode step" },
  { name: "decode", label: "further tokens", hint: "all later decode steps" },
  { name: "delivery", label: "delivery", hint: "from the instance to the API" },
  { name: "pause", label: "pause", hint: "from the loss of an instance to the next token" },
];
const NUM_STAGES_TO_SECOND_TOKEN = 7;

const BLOCK_STATES = ["active", "filling", "leased", "quarantined", "cached", "free"];

/* The value below which the share q of sorted values lies, between neighbours in proportion (as numpy does it). */
function percentile(sorted, q) {
  if (!sorted.length) return NaN;
  const place = q * (sorted.length - 1), below = Math.floor(place);
  const above = Math.min(below + 1, sorted.length - 1);
  return sorted[below] + (sorted[above] - sorted[below]) * (place - below);
}

function percentiles(requests, field) {
  const sorted = requests.map(one => one[field]).filter(value => value !== null).sort((a, b) => a - b);
  return { count: sorted.length, p50: percentile(sorted, 0.5), p90: percentile(sorted, 0.9), p99: percentile(sorted, 0.99) };
}

/* A latency as people write it, in seconds: 250ms, 0.25s, 250 (ms). NaN for what is none, null for nothing. */
function parseLatency(text) {
  if (!text || !text.trim()) return null;
  const match = /^(\d+(?:\.\d+)?)\s*(us|ms|s)?$/.exec(text.trim());
  return match && Number(match[1]) > 0 ? Number(match[1]) * { us: 1e-6, ms: 1e-3, s: 1 }[match[2] ?? "ms"] : NaN;
}

/* Both objectives kept by a request that came to its end; one without a TPOT (a single token) keeps that. */
function meets(request, slo) {
  return COMPLETE.has(request.finish_reason) && request.ttft_s <= (slo.ttft ?? Infinity)
    && (request.tpot_s ?? 0) <= (slo.tpot ?? Infinity);
}

const endOf = request => request.arrival_unix_s + (request.stamps.finished ?? request.e2e_s ?? request.ttft_s ?? 0);

/* What a request that did not come to its end waited for after its last stage. */
const lostSeconds = request => COMPLETE.has(request.finish_reason) || request.stamps.finished === undefined ? 0
  : Math.max(0, request.stamps.finished - Object.values(request.stages).reduce((sum, seconds) => sum + seconds, 0));

/* Growth of a counter from one answer to the next; one that fell began anew with its instance. */
const growth = (before, after) => after >= before ? after - before : after;

/* What is to be said of an instance beside its figures; nothing of one that is ready. */
function wordsOf(one) {
  if (one.state === "starting") return one.detail === "starting" ? "being started" : `being started: ${one.detail}`;
  if (one.state !== "draining") return one.state === "ready" ? "" : one.detail;
  const left = one.num_sequences;
  const holds = left ? `${left} ${left === 1 ? "sequence" : "sequences"} still on it` : "holds nothing any more";
  return `${one.is_leaving ? "leaves" : "gets nothing new"}: ${holds}`;
}

/* What the server decided of its own instances, with the numbers: [what decides, words]. */
function decisionsOf(status) {
  const share = part => `${(100 * part).toFixed(0)}%`;
  const scaled = status.scaling.map(one => {
    const fewer = one.attainment_with_fewer === null ? "" : `, ${share(one.attainment_with_fewer)} with ${one.count - 1}`;
    const predicted = one.attainment === null ? "" : `; predicted attainment ${share(one.attainment)}${fewer}`;
    const last = one.last_change ? `; last change: ${one.last_change}` : "";
    return ["autoscaling", `${one.count} ${one.role} of ${one.fewest}..${one.most}${predicted}${last}`];
  });
  return status.plan ? [...scaled, ["re-planning", status.plan]] : scaled;
}

class Store {
  constructor() {
    this.status = null;
    this.samples = [];
    this.requests = [];
    this.after = -1000;
    this.dropped = 0;
  }

  get now() { return this.status ? this.status.now_unix_s : 0; }

  takeStatus(status) {
    const before = this.status;
    const seconds = before ? status.now_unix_s - before.now_unix_s : 0;
    this.status = status;
    const instances = new Map();
    for (const one of status.instances) {
      const last = before && before.instances.find(other => other.instance === one.instance);
      const rate = field => last && seconds > 0 ? growth(last[field], one[field]) / seconds : 0;
      instances.set(one.instance, {
        prefillRate: rate("num_prefill_tokens_total"),
        decodeRate: rate("num_decode_tokens_total"),
        stepRate: rate("num_steps_total"),
      });
    }
    const all = [...instances.values()];
    const sum = (rows, field) => rows.reduce((total, row) => total + row[field], 0);
    const handOver = field => before && seconds > 0
      ? growth(before.hand_overs[field], status.hand_overs[field]) / seconds : 0;
    this.samples.push({
      at: status.now_unix_s,
      seconds,
      instances,
      underWay: status.num_under_way,
      waiting: sum(status.instances, "num_waiting"),
      running: sum(status.instances, "num_running"),
      prefillRate: sum(all, "prefillRate"),
      decodeRate: sum(all, "decodeRate"),
      handOverRate: handOver("num_total"),
      byteRate: handOver("bytes_total"),
      pullSecondsRate: handOver("seconds_total"),
    });
    const oldest = status.now_unix_s - LONGEST_WINDOW_S;
    while (this.samples.length > 1 && this.samples[0].at < oldest) this.samples.shift();
  }

  takeRequests(page) {
    this.after = page.next;
    this.dropped += page.dropped;
    this.requests.push(...page.requests);
    const oldest = this.now - LONGEST_WINDOW_S;
    this.requests = this.requests.filter(one => endOf(one) >= oldest).slice(-MAX_REQUESTS);
  }

  /* Where the time axes of a window begin: later than the window where there is nothing yet to fill it. */
  begin(windowS) {
    const first = Math.min(this.samples[0].at, ...this.requests.slice(0, 1).map(endOf));
    return Math.max(this.now - windowS, Math.min(first, this.now - 60));
  }

  samplesOf(windowS) { return this.samples.filter(one => one.at >= this.now - windowS); }

  requestsOf(windowS) { return this.requests.filter(one => endOf(one) >= this.now - windowS); }

  /* Mean of a rate over the last seconds: single seconds jump. The first sample has no rate. */
  recent(field, seconds = 5) {
    const rows = this.samples.filter(one => one.seconds > 0 && one.at > this.now - seconds);
    const length = rows.reduce((total, row) => total + row.seconds, 0);
    return length ? rows.reduce((total, row) => total + field(row) * row.seconds, 0) / length : 0;
  }

  /* Requests that ended, a second, in equal parts of the time since then: [{at, value}]. */
  endedPerSecond(from, numParts = 60) {
    const part = (this.now - from) / numParts, counts = new Array(numParts).fill(0);
    for (const one of this.requests) {
      const index = Math.floor((endOf(one) - from) / part);
      if (index >= 0 && index < numParts) counts[index] += 1;
    }
    return counts.map((count, index) => ({ at: from + (index + 1) * part, value: count / part }));
  }
}
