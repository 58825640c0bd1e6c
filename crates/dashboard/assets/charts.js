// Draws curves and the swarm as SVG. No library: two shapes do not need one.

const SVG = "http://www.w3.org/2000/svg";

function element(name, attributes, text) {
  const node = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== undefined) node.textContent = text;
  return node;
}

function number(value) {
  if (Math.abs(value) >= 1000) return value.toFixed(0);
  return Number(value.toPrecision(3)).toString();
}

function canvas(box) {
  const width = Math.max(box.clientWidth, 120), height = Math.max(box.clientHeight, 80);
  const svg = element("svg", { viewBox: `0 0 ${width} ${height}` });
  box.replaceChildren(svg);
  return { svg, width, height };
}

/** A running mean over about a twentieth of the points. */
function smooth(points) {
  const gain = 1 / Math.max(1, points.length / 20);
  let mean = points[0][1];
  return points.map(([x, y]) => [x, mean += gain * (y - mean)]);
}

/** The ends of an axis, with as many digits as their distance needs. */
function ends(from, to) {
  const digits = Math.max(0, Math.min(3, 1 - Math.floor(Math.log10(to - from || 1))));
  return [from, to].map(value => Number(value.toFixed(digits)).toString());
}

/** One curve: points are [x, y] pairs in order of x. If they are noisy, their running mean is drawn over them. */
export function curve(box, points, what, xName, noisy = false) {
  const { svg, width, height } = canvas(box);
  if (points.length < 2) {
    svg.append(element("text", { x: width / 2, y: height / 2, "text-anchor": "middle" }, "nothing to show yet"));
    box.setAttribute("aria-label", `${what}: nothing to show yet`);
    return;
  }
  const left = 46, right = 8, top = 8, bottom = 22;
  const xs = points.map(p => p[0]), ys = points.map(p => p[1]);
  const [x0, x1] = [Math.min(...xs), Math.max(...xs)];
  let [y0, y1] = [Math.min(...ys), Math.max(...ys)];
  if (y1 - y0 < 1e-9 * Math.max(1, Math.abs(y1))) { y0 -= 0.5; y1 += 0.5; }
  const px = x => left + (x - x0) / (x1 - x0 || 1) * (width - left - right);
  const py = y => top + (y1 - y) / (y1 - y0) * (height - top - bottom);
  for (let step = 0; step <= 3; step++) {
    const y = y0 + (y1 - y0) * step / 3;
    svg.append(element("line", { class: "grid", x1: left, x2: width - right, y1: py(y), y2: py(y) }));
    svg.append(element("text", { x: left - 6, y: py(y) + 4, "text-anchor": "end" }, number(y)));
  }
  const [first, last] = ends(x0, x1);
  svg.append(element("text", { x: left, y: height - 6 }, first));
  svg.append(element("text", { x: width - right, y: height - 6, "text-anchor": "end" }, `${last} ${xName}`));
  const line = (points, name) => svg.append(element("polyline", { class: name, points: points.map(p => `${px(p[0])},${py(p[1])}`).join(" ") }));
  line(points, noisy ? "curve raw" : "curve");
  if (noisy) line(smooth(points), "curve");
  box.setAttribute("aria-label", `${what}: from ${number(ys[0])} to ${number(ys[ys.length - 1])} over ${number(x1 - x0)} ${xName}`);
}

/** The direction in which no line leaves, where a name has room; none if lines leave in all directions. */
function freeAngle(angles) {
  if (!angles.length) return Math.PI / 2;
  const sorted = [...angles].sort((a, b) => a - b);
  const gaps = sorted.map((angle, index) => [(sorted[index + 1] ?? sorted[0] + 2 * Math.PI) - angle, angle]);
  const [gap, from] = gaps.reduce((best, gap) => gap[0] > best[0] + 1e-9 ? gap : best);
  return gap > Math.PI / 2 ? from + gap / 2 : null;
}

/** Who is here and how the one whose view this is, in the middle, is connected to them; names away from the lines. */
export function swarm(box, peers, centre) {
  const { svg, width, height } = canvas(box);
  const others = peers.filter(peer => peer !== centre);
  const me = centre && !centre.is_me ? centre.peer.slice(-6) : "this peer";
  const cx = width / 2, cy = height / 2, radius = Math.min(width * 0.36, height / 2 - 40);
  const stretch = Math.min(1.6, width / height / 1.2);
  const places = others.map((peer, index) => {
    const angle = 2 * Math.PI * index / Math.max(others.length, 1) - Math.PI / 2;
    return [cx + radius * Math.cos(angle) * stretch, cy + radius * Math.sin(angle)];
  });
  const name = (x, y, angle, away, text) => {
    const [dx, dy] = [Math.cos(angle), Math.sin(angle)];
    const anchor = dx > 0.5 ? "start" : dx < -0.5 ? "end" : "middle";
    svg.append(element("text", { class: "name", x: x + dx * away, y: y + dy * away + 4 + 5 * dy, "text-anchor": anchor }, text));
  };
  others.forEach((peer, index) => {
    const [x, y] = places[index];
    svg.append(element("line", { class: `edge ${peer.path ?? "unknown"}`, x1: cx, y1: cy, x2: x, y2: y }));
  });
  const towards = places.map(([x, y]) => Math.atan2(y - cy, x - cx));
  others.forEach((peer, index) => {
    const [x, y] = places[index], r = 9 + 8 * peer.share;
    svg.append(element("circle", { class: "node", cx: x, cy: y, r }));
    // Above or below: beside it there may be no room on a phone.
    name(x, y, y < cy - 1 ? -Math.PI / 2 : Math.PI / 2, r + 8, peer.peer.slice(-6));
  });
  svg.append(element("circle", { class: "node me", cx, cy, r: 12 }));
  const free = freeAngle(towards);
  if (free !== null) {
    name(cx, cy, free, 20, me);
  } else {
    svg.append(element("circle", { class: "node me", cx: 8, cy: 10, r: 6 }));
    name(8, 10, 0, 12, me);
  }
  const paths = others.map(peer => `${peer.peer.slice(-6)} ${(peer.path ?? "not connected").replace("_", "-")}`);
  box.setAttribute("aria-label", others.length ? `${others.length} other peers: ${paths.join(", ")}` : "nobody else is here");
}
