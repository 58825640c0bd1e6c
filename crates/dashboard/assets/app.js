// Shows the status that the peer sends. Every figure comes from it; nothing is counted here.

import { curve, swarm } from "./charts.js";

const $ = id => document.getElementById(id);
const points = [];
let last = null, calm = null;

function bytes(value) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let unit = 0;
  while (value >= 1000 && unit < units.length - 1) { value /= 1000; unit++; }
  return `${unit ? value.toFixed(1) : value} ${units[unit]}`;
}

const rounded = (value, digits = 3) => value === null || value === undefined ? "–" : Number(value.toPrecision(digits)).toString();

/** A time for people: nobody waits for a digit of a second. */
function remaining(seconds) {
  if (seconds < 1) return "under 1 s";
  if (seconds < 100) return `about ${Math.round(seconds)} s`;
  return seconds < 6000 ? `about ${Math.round(seconds / 60)} min` : `about ${rounded(seconds / 3600, 2)} h`;
}

const took = seconds => seconds < 1 ? `${rounded(1000 * seconds)} ms` : `${rounded(seconds)} s`;

function cell(row, text) {
  const td = document.createElement("td");
  td.textContent = text;
  row.append(td);
  return td;
}

/** A measured rate; older peers do not tell theirs. */
const megabytes = rate => rate === null || rate === undefined ? "–" : rounded(rate / 1e6, 2);

/** Whose view this is: this peer, or, for those who only watch, the peer that was asked. */
const viewer = status => status.peers.find(p => p.is_me) ?? status.peers.find(p => p.peer === status.peer);

function board(status) {
  const peers = status.peers, centre = viewer(status);
  const mark = peer => peer !== centre ? "" : peer.is_me ? "this peer" : "asked";
  const sorted = [...peers].sort((a, b) => b.contributed - a.contributed || (a.peer < b.peer ? -1 : 1));
  const here = sorted.map((peer, index) => {
    const row = document.createElement("tr");
    if (peer.is_me) row.className = "me";
    cell(row, index + 1);
    const name = cell(row, peer.peer.slice(-6));
    for (const note of [mark(peer), peer.auxiliary ? "auxiliary" : ""].filter(Boolean)) {
      const small = document.createElement("small");
      small.textContent = ` (${note})`;
      name.append(small);
    }
    cell(row, peer.contributed);
    cell(row, `${(100 * peer.share).toFixed(0)} %`);
    cell(row, rounded(peer.samples_per_second));
    cell(row, peer.epoch);
    cell(row, rounded(peer.loss, 4));
    const path = cell(row, peer === centre ? "–" : (peer.path ?? "not connected").replace("_", "-"));
    const rates = [peer.up_bytes_per_second, peer.down_bytes_per_second].map(megabytes);
    if (rates.some(rate => rate !== "–")) {
      const small = document.createElement("small");
      small.textContent = ` ${rates.join("/")} MB/s`;
      path.append(small);
    }
    return row;
  });
  $("board").replaceChildren(...here, ...status.left.map(left));
}

/** Whoever is here no more has given what it gave all the same. */
function left(peer) {
  const row = document.createElement("tr");
  row.className = "left";
  for (const text of ["–", peer.peer.slice(-6), peer.contributed, "–", "–", peer.epoch, "–", "left"]) cell(row, text);
  return row;
}

function round(found) {
  const rows = found === null ? [["", "no round yet"]] : [
    ["epoch", found.epoch], ["averaged", found.unchanged ? "nothing: all had the same state already" : found.channel], ["members", found.members.length],
    // The weight of a state is a matter of the policy, and no number of samples.
    ...(found.channel === "gradients" ? [["samples", rounded(found.weight_total, 6)]] : []), ["took", took(found.seconds)],
    ["sent", bytes(found.bytes_sent)], ["received", bytes(found.bytes_received)],
    ["faults", found.faults.length ? found.faults.map(f => `…${f.peer.slice(-6)} ${f.kind}`).join(", ") : "none"],
  ];
  list($("round"), rows);
}

function total(status) {
  const named = (entries, show) => Object.entries(entries).map(([name, value]) => `${show(value)} ${name}`).join(", ");
  list($("total"), [
    ["rounds", status.rounds + (status.rounds_unchanged ? ` (${status.rounds_unchanged} had nothing to average)` : "")],
    ["failed", status.rounds_failed],
    ["faults", named(status.faults, String) || "none"],
    ["sent", bytes(status.bytes_sent)], ["received", bytes(status.bytes_received)],
    ["samples", status.lineage ? status.lineage.samples : "–"],
    ["memory", named(status.memory, bytes) || "–"],
  ]);
}

function list(dl, rows) {
  dl.replaceChildren(...rows.flatMap(([name, value]) => {
    const [dt, dd] = [document.createElement("dt"), document.createElement("dd")];
    dt.textContent = name;
    dd.textContent = value;
    return [dt, dd];
  }));
}

function show(status) {
  last = status;
  document.title = `potluck ${status.run_id}: epoch ${status.epoch}`;
  $("run").textContent = status.run_id;
  $("epoch").textContent = status.epoch;
  $("peers").textContent = Math.max(status.peers.length, 1);
  $("loss").textContent = rounded(status.loss, 4);
  $("speed").textContent = rounded(status.samples_per_second);
  $("sent").textContent = bytes(status.bytes_sent);
  $("ratio").textContent = `${rounded(status.compression_ratio)} : 1`;
  const target = Math.max(status.target_batch_size, 1);
  $("progress").value = Math.min(1, status.samples / target);
  const eta = status.eta_seconds === null ? "" : `, ${remaining(status.eta_seconds)} left`;
  $("progress-text").textContent = `${status.samples} of ${status.target_batch_size} samples${eta}`;
  $("alert").hidden = !status.alone;
  const who = viewer(status)?.is_me === false ? "One peer is training alone" : "You are training alone";
  $("alert").textContent = status.alone ? `${who}: no other peer is here.` : "";
  board(status);
  round(status.last_round);
  total(status);
  swarm($("swarm"), status.peers, viewer(status));
}

function curves() {
  const withLoss = points.filter(p => p.loss !== null);
  // The loss of one batch jumps up and down; what it comes to is the thick line.
  curve($("loss-chart"), withLoss.map(p => [p.epoch, p.loss]), "loss", "epochs", true);
  curve($("speed-chart"), points.map(p => [p.seconds, p.samples_per_second]), "samples per second", "s");
}

/** Rounds in which all went well, one after the other, are one line; what stands out is not lost between them. */
function well(event) {
  if (event.what.event !== "round" || event.what.faults.length) { calm = null; return false; }
  if (!calm) {
    calm = { item: document.createElement("li"), count: 0, first: event.what.epoch };
    $("events").prepend(calm.item);
  }
  calm.count++;
  // One with nothing to average says less than the one before it.
  if (!event.what.unchanged || !calm.text) calm.text = event.text;
  const before = calm.count === 1 ? "" : ` (and ${calm.count - 1} more since epoch ${calm.first}, none with a fault)`;
  calm.item.textContent = calm.text + before;
  return true;
}

function happened(event) {
  if (well(event)) return;
  const item = document.createElement("li");
  item.textContent = event.text;
  const bad = ["alone", "copied", "lost", "round_failed", "state_failed", "lineage_lost"];
  if (bad.includes(event.what.event) && !event.what.left) item.className = "bad";
  $("events").prepend(item);
  while ($("events").children.length > 200) $("events").lastChild.remove();
}

async function history() {
  const answer = await (await fetch("api/history")).json();
  points.splice(0, points.length, ...answer.points);
  if (answer.replayed) $("connection").dataset.open = "replay of a log";
  return answer.events;
}

async function start() {
  (await history()).forEach(happened);
  curves();
  const live = new EventSource("api/live");
  live.addEventListener("open", () => { $("connection").textContent = $("connection").dataset.open ?? "live"; });
  live.addEventListener("error", () => { $("connection").textContent = "the peer does not answer; trying again"; });
  live.addEventListener("status", message => show(JSON.parse(message.data)));
  live.addEventListener("event", message => happened(JSON.parse(message.data)));
  setInterval(() => history().then(curves, () => {}), 2000);
  addEventListener("resize", () => { curves(); if (last) swarm($("swarm"), last.peers, viewer(last)); });
}

start();
