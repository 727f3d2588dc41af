// The page of a run. It draws what the server says on /live, asks for nothing else, and changes nothing.
// Whatever the server says is text, never markup: names of devices, and what they say, are strangers' words.

const POINTS = 2000; // beyond so many, neighbouring points of a curve are merged
const EVENTS = 50;
const MARKS = 400;

const PARTS = [
  // As the bar has them: what is a device's own first, from one common line, and waiting last.
  ["edge_compute", "edge compute", "the device computes its blocks"],
  ["encode", "encode", "it makes bytes of what it sends"],
  ["uplink", "uplink", "its bytes go to the server"],
  ["downlink", "downlink", "the server's bytes come to it"],
  ["decode", "decode", "it makes numbers of what it receives"],
  ["server_compute", "server compute", "the server computes for all devices"],
  ["queue", "queue", "it waits for slower devices, or for its turn"],
];

const STATES = {
  connected: ["●", "takes part"],
  late: ["◐", "is late"],
  lost: ["○", "has lost its connection"],
  left: ["–", "has left"],
  expected: ["…", "is expected"],
};

// Numbers, moments and durations in words

const NONE = "–";
const known = (value) => typeof value === "number" && Number.isFinite(value);
const threeDigits = new Intl.NumberFormat("en", { maximumSignificantDigits: 3 });
const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });

/** No line ends between the two. */
function unit(value, name) {
  return `${value}\u00a0${name}`;
}

function count(value) {
  return known(value) ? whole.format(value) : NONE;
}

/** With three digits, or so many behind the point. */
function figure(value, behind) {
  if (!known(value)) return NONE;
  if (value !== 0 && Math.abs(value) < 0.001) return value.toExponential(1);
  if (behind !== undefined) return value.toLocaleString("en", { minimumFractionDigits: behind, maximumFractionDigits: behind });
  return Math.abs(value) < 1000 ? threeDigits.format(value) : whole.format(value);
}

function nats(value, behind = 3) {
  return known(value) ? value.toFixed(behind) : NONE;
}

function bytes(value) {
  if (!known(value)) return NONE;
  for (const name of ["B", "kB", "MB", "GB"]) {
    if (value < 999.5) return unit(threeDigits.format(value), name);
    value /= 1000;
  }
  return unit(figure(value), "TB");
}

function share(value) {
  return unit(Math.round(100 * value), "%");
}

function duration(seconds) {
  if (seconds < 10) return unit(Math.max(0, seconds).toFixed(1), "s");
  if (seconds < 120) return unit(Math.round(seconds), "s");
  const minutes = Math.round(seconds / 60);
  if (minutes < 60) return unit(minutes, "min");
  const hours = Math.floor(minutes / 60);
  if (hours < 48) return unit(hours, "h") + (minutes % 60 ? ` ${unit(minutes % 60, "min")}` : "");
  return unit(Math.floor(hours / 24), "d") + (hours % 24 ? ` ${unit(hours % 24, "h")}` : "");
}

function ago(time, now) {
  const seconds = now - time;
  return seconds < 2 ? "just now" : `${duration(seconds < 10 ? seconds : Math.round(seconds))} ago`;
}

/** The viewer's own clock; with the date where it is not today's. */
function clock(time) {
  const date = new Date(1000 * time);
  const hour = date.toLocaleTimeString("en-GB");
  if (date.toDateString() === new Date().toDateString()) return hour;
  return `${date.toLocaleDateString("en-GB", { day: "numeric", month: "short" })}, ${hour}`;
}

function sentence(text) {
  const trimmed = String(text).trim();
  const first = trimmed.charAt(0).toUpperCase() + trimmed.slice(1);
  return !first || /[.!?:]$/.test(first) ? first : `${first}.`;
}

// Elements

const $ = (id) => document.getElementById(id);

function element(name, attributes = {}, ...children) {
  return filled(document.createElement(name), attributes, children);
}

function svg(name, attributes = {}, ...children) {
  return filled(document.createElementNS("http://www.w3.org/2000/svg", name), attributes, children);
}

function filled(made, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== false) made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children);
  return made;
}

/** Leave what already says so as it is: whoever has selected it, or has it read out, is not disturbed. */
function say(where, text) {
  if (where.textContent !== String(text)) where.textContent = text;
}

function show(where, shown) {
  if (where.hidden === shown) where.hidden = !shown;
}

/** Figures with their names, as [name, value, what is said of it in small letters]. */
function sayFigures(list, figures) {
  while (list.children.length > figures.length) list.lastChild.remove();
  figures.forEach(([name, value, more = ""], index) => {
    if (!list.children[index]) list.append(element("div", {}, element("dt"), element("dd"), element("dd", { class: "more" })));
    const [title, main, small] = list.children[index].children;
    say(title, name);
    say(main, value);
    say(small, more);
    show(small, more !== "");
  });
}

// A curve as the page holds it: points of one step, or of several with their mean, lowest and highest loss

const VALUES = ["loss", "tokens_per_second", "bytes_per_second", "learning_rate", "gradient_norm"];

class Curve {
  constructor(columns) {
    this.points = [];
    for (const point of rows(columns)) this.points.push(this.next(point));
    // As fine as the server has made it, so that new steps do not stand out against older ones.
    const widths = this.points.map((point) => point.steps).sort((a, b) => a - b);
    this.width = widths[widths.length >> 1] ?? 1;
  }

  add(columns) {
    for (const point of rows(columns)) {
      // A server that went back to its checkpoint repeats steps.
      while (this.points.length > 0 && this.last.step >= point.step) this.points.pop();
      const added = this.next(point);
      if (this.points.length > 0 && this.last.steps < this.width) this.points.push(merged(this.points.pop(), added));
      else this.points.push(added);
    }
    while (this.points.length > POINTS) this.thin();
  }

  get last() {
    return this.points[this.points.length - 1];
  }

  /** It stands for all steps since the last one that is held. */
  next(point) {
    const steps = this.points.length > 0 ? Math.max(1, point.step - this.last.step) : 1;
    return { ...point, steps, loss_low: point.loss_low ?? point.loss, loss_high: point.loss_high ?? point.loss };
  }

  thin() {
    this.width *= 2;
    const thinner = [];
    for (const point of this.points) {
      const before = thinner[thinner.length - 1];
      if (before && before.steps + point.steps <= this.width) thinner[thinner.length - 1] = merged(before, point);
      else thinner.push(point);
    }
    this.points = thinner;
  }
}

function rows(columns) {
  const names = Object.keys(columns ?? {});
  const length = columns?.step?.length ?? 0;
  return Array.from({ length }, (_, index) => Object.fromEntries(names.map((name) => [name, columns[name]?.[index] ?? null])));
}

function merged(one, other) {
  const steps = one.steps + other.steps;
  const both = { step: other.step, time: other.time, steps };
  for (const name of VALUES) both[name] = mean(one[name], one.steps, other[name], other.steps);
  both.loss_low = Math.min(one.loss_low ?? Infinity, other.loss_low ?? Infinity);
  both.loss_high = Math.max(one.loss_high ?? -Infinity, other.loss_high ?? -Infinity);
  return both;
}

function mean(one, weight, other, otherWeight) {
  if (!known(one)) return other;
  if (!known(other)) return one;
  return (one * weight + other * otherWeight) / (weight + otherWeight);
}

/** An exponential mean over about so many steps to both sides of each: it neither lags behind nor is pulled by an end. */
function smoothed(points, name, span) {
  const forwards = smoothedForwards(points, name, span);
  const backwards = smoothedForwards(points.slice().reverse(), name, span).reverse();
  return forwards.map((value, index) => (value === null ? null : (value + backwards[index]) / 2));
}

function smoothedForwards(points, name, span) {
  let sum = 0;
  let weights = 0;
  return points.map((point) => {
    if (!known(point[name])) return null;
    const kept = Math.exp(-point.steps / span);
    sum = sum * kept + point[name] * (1 - kept);
    weights = weights * kept + (1 - kept);
    return sum / weights;
  });
}

/** How a column has changed from the last tenth but one of the run to its last: beyond what its noise alone would do, or not. */
function trend(points, name) {
  const values = points.map((point) => point[name]).filter(known);
  const length = Math.floor(values.length / 10);
  if (length < 5) return null;
  const [before, now] = [values.slice(-2 * length, -length), values.slice(-length)].map(meanAndError);
  const change = now.mean - before.mean;
  if (Math.abs(change) < 2 * Math.hypot(before.error, now.error)) return "steady";
  return change < 0 ? "falling" : "rising";
}

function meanAndError(values) {
  const average = values.reduce((sum, value) => sum + value, 0) / values.length;
  const squares = values.reduce((sum, value) => sum + (value - average) ** 2, 0);
  return { mean: average, error: Math.sqrt(squares / values.length / (values.length - 1)) };
}

// What is known of the run

const run = { overview: null, curve: new Curve(), evaluations: [], marks: [], events: [], codecs: [], isNew: false };

function take(message) {
  if (message.kind === "snapshot") {
    Object.assign(run, { curve: new Curve(message.curve), evaluations: [], marks: [], events: [], codecs: [], isNew: true });
  } else if (message.kind === "update" && run.overview) {
    run.curve.add(message.curve);
  } else {
    return; // of a later version
  }
  run.overview = message.overview ?? run.overview;
  const events = message.events ?? [];
  run.evaluations.push(...rows(message.evaluations));
  if (run.evaluations.length > POINTS) run.evaluations = everyOther(run.evaluations);
  run.marks = [...run.marks, ...(message.marks ?? [])].slice(-MARKS);
  run.events = [...run.events, ...events].slice(-EVENTS);
  run.codecs = [...run.codecs, ...events.filter((event) => event.kind === "codec")].slice(-10);
  announceNews(message.kind === "snapshot", events);
}

/** Half of the evaluations, the newest of every client among them. */
function everyOther(evaluations) {
  const seen = new Map();
  return evaluations
    .slice()
    .reverse()
    .filter((evaluation) => {
      const before = seen.get(evaluation.client) ?? 0;
      seen.set(evaluation.client, before + 1);
      return before % 2 === 0;
    })
    .reverse();
}

// The connection

const FIRST_WAIT = 1;
const LONGEST_WAIT = 10;
const SILENCE = 15; // seconds; the server says something every five

const link = { socket: null, heard: Date.now() / 1000, awaySince: null, wait: FIRST_WAIT, retry: 0, watchdog: 0 };

function connect() {
  clearTimeout(link.retry);
  const address = new URL(`live${location.search}`, location.href);
  address.protocol = address.protocol.replace("http", "ws");
  const socket = new WebSocket(address);
  link.socket = socket;
  const lost = (since) => {
    if (link.socket === socket) reconnect(since);
  };
  const listen = () => {
    clearTimeout(link.watchdog);
    link.watchdog = setTimeout(() => lost(link.heard), 1000 * SILENCE);
  };
  socket.onclose = () => lost(Date.now() / 1000);
  socket.onmessage = ({ data }) => {
    listen();
    link.heard = Date.now() / 1000;
    link.wait = FIRST_WAIT;
    if (link.awaySince !== null && run.overview) announce("The server is back.");
    link.awaySince = null;
    take(JSON.parse(data));
    redraw();
  };
  listen();
}

function reconnect(since) {
  const socket = link.socket;
  link.socket = null;
  socket?.close();
  clearTimeout(link.watchdog);
  if (link.awaySince === null) {
    link.awaySince = since;
    announce(awayText());
  }
  clearTimeout(link.retry);
  link.retry = setTimeout(connect, 1000 * link.wait * (0.75 + Math.random() / 2)); // so that not all pages come at once
  link.wait = Math.min(LONGEST_WAIT, 1.5 * link.wait);
  redraw();
}

function retryNow() {
  if (link.socket === null && document.visibilityState === "visible") connect();
}

addEventListener("online", retryNow);
document.addEventListener("visibilitychange", retryNow);

function isOver() {
  return ["finished", "stopped"].includes(run.overview?.state);
}

function awayText() {
  const since = clock(link.awaySince);
  if (!run.overview) {
    return `No answer from the server since ${since}, trying again. If it has a token, this page's address ends in ?token=…`;
  }
  if (isOver()) return `The server has ended at ${since}. Should it be started again, this page goes on.`;
  return `The server is away since ${since}, trying again. This is what was last seen.`;
}

// What is read out: news that matter, a few words at a time

const SECONDS_BETWEEN_NEWS = 10;
const NEWS = [
  "lost",
  "back",
  "left",
  "joined",
  "overtaken",
  "takes_part_again",
  "training_started",
  "complete",
  "stopped",
  "failed",
];

const announcer = { waiting: [], last: -Infinity, timer: 0 };

function announceNews(isSnapshot, events) {
  if (isSnapshot) return; // old news; whoever opens the page reads its heading
  for (const event of events) {
    if (NEWS.includes(event.kind) || ["warning", "error"].includes(event.level)) announce(sentence(event.text));
  }
}

function announce(text) {
  announcer.waiting.push(text);
  if (announcer.timer) return;
  const seconds = Math.max(0.2, announcer.last + SECONDS_BETWEEN_NEWS - performance.now() / 1000);
  announcer.timer = setTimeout(() => {
    const texts = announcer.waiting;
    say(
      $("announcer"),
      texts.length <= 3 ? texts.join(" ") : `${texts.length} things have happened; the latest: ${texts[texts.length - 1]}`,
    );
    Object.assign(announcer, { waiting: [], last: performance.now() / 1000, timer: 0 });
  }, 1000 * seconds);
}

// Charts

const view = { along: "step", range: 1, cursor: null };
const GAP = { left: 52, right: 12, top: 14, bottom: 34 };
const SHAPES = ["circle", "square", "triangle", "diamond"];

/**
 * One picture of lines over steps or time, with a cursor that all charts share.
 *
 * `lines` makes of the run a list of {points: [{step, time, value}], style, band, shape, name}; the cursor stops at the points of
 * the first. `reading` says in words what is at one of these, and if asked to, where that is.
 */
class Chart {
  constructor(parent, { title, lines, reading, format, fromZero = false, empty = "Nothing yet.", isLarge = false }) {
    Object.assign(this, { title, lines, reading, format, fromZero });
    this.heading = element("h3", {}, title);
    this.text = element("p", { class: "reading" });
    this.picture = svg("svg", { "aria-hidden": "true", focusable: "false" });
    // Arrow keys move a cursor along it, and what is there is read out: that is a slider.
    this.plot = element(
      "div",
      { class: "plot", role: "slider", tabindex: "0", "aria-label": `${title}, values along the run` },
      this.picture,
    );
    this.empty = element("p", { class: "quiet empty" }, empty);
    this.names = element("p", { class: "signs quiet", hidden: true });
    this.figure = element("figure", { class: isLarge ? "large" : null });
    this.figure.append(element("figcaption", {}, this.heading, this.text), this.plot, this.names, this.empty);
    parent.append(this.figure);
    this.stops = [];
    this.plot.addEventListener("keydown", (event) => this.onKey(event));
    this.plot.addEventListener("focus", () => this.describeStop());
    this.plot.addEventListener("pointermove", (event) => this.onPointer(event));
    this.plot.addEventListener("pointerdown", (event) => this.onPointer(event));
    this.plot.addEventListener("pointerleave", () => moveCursor(null));
    new ResizeObserver(() => this.draw()).observe(this.plot);
  }

  draw() {
    const all = run.overview ? this.lines(run) : [];
    const [from, to] = domain([...run.curve.points, ...run.evaluations, ...run.marks]);
    const lines = all.map((line) => ({
      ...line,
      points: line.points.filter((point) => point[view.along] >= from && point[view.along] <= to),
    }));
    const values = lines.flatMap((line) => line.points.flatMap((point) => [point.value, point.low, point.high])).filter(known);
    this.stops = values.length > 0 ? lines[0].points : [];
    show(this.plot, this.stops.length > 0);
    show(this.empty, this.stops.length === 0);
    const { clientWidth: width, clientHeight: height } = this.plot;
    if (this.stops.length > 0 && width > 0) {
      const across = scale([from, to], [GAP.left, width - GAP.right]);
      const up = scale(this.extent(values), [height - GAP.bottom, GAP.top]);
      this.across = across;
      this.picture.setAttribute("viewBox", `0 0 ${width} ${height}`);
      this.cursor = svg("g", { class: "cursor" });
      this.picture.replaceChildren(
        axes(across, up, { width, height }, this.format),
        marks(across, height),
        ...lines.map((line) => drawn(line, across, up)),
        this.cursor,
      );
      this.lineScale = up;
      this.drawn = lines;
    }
    drawSigns(
      this.names,
      lines
        .filter((line) => line.name)
        .map(({ shape, name, style }) => [name, svg("g", { class: `line ${style}` }, pointShape(shape, 6, 11))]),
    );
    if (document.activeElement !== this.plot) this.describeStop();
    this.drawCursor();
  }

  extent(values) {
    const low = this.fromZero ? 0 : Math.min(...values);
    const high = Math.max(...values);
    const room = (high - low || Math.abs(high) || 1) * 0.06;
    return [this.fromZero ? 0 : low - room, high + room];
  }

  drawCursor() {
    if (this.stops.length === 0) return say(this.text, "");
    const stop = this.stops[this.nearest(view.cursor)];
    say(this.text, view.cursor === null ? `latest: ${this.reading(stop)}` : this.reading(stop, true));
    this.text.classList.toggle("held", view.cursor !== null);
    if (!this.cursor) return;
    this.cursor.replaceChildren();
    if (view.cursor === null) return;
    const x = this.across(stop[view.along]);
    this.cursor.append(svg("line", { x1: x, x2: x, y1: GAP.top, y2: this.plot.clientHeight - GAP.bottom }));
    for (const line of this.drawn) {
      const point = line.points.find((each) => each.step === stop.step);
      if (point && known(point.value)) this.cursor.append(svg("circle", { cx: x, cy: this.lineScale(point.value), r: 4 }));
    }
  }

  /** The index of the stop nearest to a step; of the last one where nobody points at any. */
  nearest(step) {
    if (step === null) return this.stops.length - 1;
    const behind = this.stops.findIndex((stop) => stop.step >= step);
    if (behind === -1) return this.stops.length - 1;
    return behind > 0 && step - this.stops[behind - 1].step < this.stops[behind].step - step ? behind - 1 : behind;
  }

  onPointer(event) {
    if (this.stops.length === 0 || !this.across) return;
    const x = event.clientX - this.plot.getBoundingClientRect().left;
    const distance = (stop) => Math.abs(this.across(stop[view.along]) - x);
    moveCursor(this.stops.reduce((best, stop) => (distance(stop) < distance(best) ? stop : best)).step);
  }

  onKey(event) {
    const last = this.stops.length - 1;
    const far = Math.max(1, Math.round(this.stops.length / 10));
    const now = this.nearest(view.cursor);
    const to = {
      ArrowLeft: now - 1,
      ArrowDown: now - 1,
      ArrowRight: now + 1,
      ArrowUp: now + 1,
      PageDown: now - far,
      PageUp: now + far,
      Home: 0,
      End: last,
    }[event.key];
    if (event.key === "Escape") moveCursor(null);
    else if (to === undefined || last < 0 || event.ctrlKey || event.metaKey || event.altKey) return;
    else moveCursor(this.stops[Math.min(last, Math.max(0, to))].step);
    event.preventDefault();
    this.describeStop();
  }

  /** While it is in focus only when it is moved: a value that changes by itself would be read out twice a second. */
  describeStop() {
    if (this.stops.length === 0) return;
    const stop = this.stops[this.nearest(view.cursor)];
    const values = {
      min: this.stops[0].step,
      max: this.stops[this.stops.length - 1].step,
      now: stop.step,
      text: this.reading(stop, true),
    };
    for (const [name, value] of Object.entries(values)) this.plot.setAttribute(`aria-value${name}`, value);
  }
}

function moveCursor(step) {
  view.cursor = step;
  charts.forEach((chart) => chart.drawCursor());
}

function domain(points) {
  const values = points
    .map((point) => point[view.along])
    .filter((value) => known(value) && (view.along === "step" || value > 0));
  if (values.length === 0) return [0, -1];
  const first = values.reduce((a, b) => Math.min(a, b));
  const last = values.reduce((a, b) => Math.max(a, b));
  return [last - (last - first) * view.range, last];
}

function scale([from, to], [start, end]) {
  const position = (value) => (to === from ? (start + end) / 2 : start + ((value - from) / (to - from)) * (end - start));
  position.domain = [from, to];
  return position;
}

/** Round values within a scale, about so many, and how many digits behind the point tell them apart. */
function ticks([from, to], about) {
  const rough = (to - from) / about || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const size = [1, 2, 5, 10].map((factor) => factor * power).find((each) => each >= 0.999 * rough);
  return [multiples(from, to, size), Math.max(0, -Math.floor(Math.log10(size) + 0.001))];
}

function multiples(from, to, size) {
  const first = Math.ceil(from / size);
  return Array.from({ length: Math.max(0, Math.floor(to / size) - first + 1) }, (_, index) => (first + index) * size);
}

function axes(across, up, { width, height }, format) {
  const group = svg("g", { class: "axes" });
  const [heights, digits] = ticks(up.domain, height / 40);
  for (const value of heights) {
    const y = up(value);
    group.append(
      svg("line", { x1: GAP.left, x2: width - GAP.right, y1: y, y2: y }),
      svg("text", { x: GAP.left - 8, y: y + 4, "text-anchor": "end" }, format(value, digits)),
    );
  }
  const baseline = height - GAP.bottom;
  group.append(svg("line", { class: "base", x1: GAP.left, x2: width - GAP.right, y1: baseline, y2: baseline }));
  const [values, name] =
    view.along === "time"
      ? timeTicks(across.domain, width / 110)
      : [ticks(across.domain, width / 90)[0].filter(Number.isInteger), count];
  for (const value of values) {
    const anchor = across(value) > width - 30 ? "end" : "middle";
    const x = anchor === "end" ? width : across(value);
    group.append(svg("text", { x, y: height - 10, "text-anchor": anchor }, name(value)));
  }
  return group;
}

const MINUTE = 60;
const HOUR = 60 * MINUTE;
const DAY = 24 * HOUR;
const TIME_STEPS = [
  1,
  5,
  10,
  30,
  MINUTE,
  5 * MINUTE,
  10 * MINUTE,
  30 * MINUTE,
  HOUR,
  3 * HOUR,
  6 * HOUR,
  12 * HOUR,
  DAY,
  2 * DAY,
  7 * DAY,
  28 * DAY,
  365 * DAY,
];

function timeTicks([from, to], about) {
  const size = TIME_STEPS.find((each) => each >= (to - from) / about) ?? 3650 * DAY;
  const zone = -MINUTE * new Date(1000 * from).getTimezoneOffset();
  const values = multiples(from + zone, to + zone, size).map((value) => value - zone);
  const format =
    size >= DAY
      ? { day: "numeric", month: "short" }
      : size >= MINUTE
        ? { hour: "2-digit", minute: "2-digit" }
        : { hour: "2-digit", minute: "2-digit", second: "2-digit" };
  return [values, (value) => new Date(1000 * value).toLocaleString("en-GB", format)];
}

function marks(across, height) {
  const group = svg("g", { class: "marks" });
  const [from, to] = across.domain;
  const baseline = height - GAP.bottom;
  for (const mark of run.marks) {
    const at = mark[view.along];
    if (!known(at) || at < from || at > to) continue;
    group.append(markSign(mark.kind, across(at), baseline));
  }
  return group;
}

/** A checkpoint is a triangle below the axis; a restart and another codec are lines, dashed with a ring and dotted with a square. */
function markSign(kind, x, baseline, top = GAP.top) {
  if (kind === "checkpoint") {
    const corners = [x, baseline + 1, x + 3, baseline + 7, x - 3, baseline + 7];
    return svg("polygon", { class: kind, points: corners.join(" ") });
  }
  const line = svg("line", { class: kind, x1: x, x2: x, y1: top, y2: baseline });
  const sign =
    kind === "restart"
      ? svg("circle", { class: kind, cx: x, cy: top - 5, r: 3.5 })
      : svg("rect", { class: kind, x: x - 3.5, y: top - 8.5, width: 7, height: 7 });
  return svg("g", {}, line, sign);
}

function drawn(line, across, up) {
  const group = svg("g", { class: `line ${line.style}` });
  if (line.shape) group.classList.add(line.shape);
  const points = line.points.filter((point) => known(point.value));
  const x = (point) => across(point[view.along]).toFixed(1);
  if (line.band) {
    const banded = points.filter((point) => known(point.low) && known(point.high));
    const edges = [
      ...banded.map((point) => `${x(point)},${up(point.high).toFixed(1)}`),
      ...banded.reverse().map((point) => `${x(point)},${up(point.low).toFixed(1)}`),
    ];
    group.append(svg("polygon", { class: "band", points: edges.join(" ") }));
  }
  group.append(svg("polyline", { points: points.map((point) => `${x(point)},${up(point.value).toFixed(1)}`).join(" ") }));
  if (line.shape && points.length <= 100) {
    for (const point of points) group.append(pointShape(line.shape, across(point[view.along]), up(point.value)));
  } else if (points.length === 1) {
    group.append(pointShape("circle", across(points[0][view.along]), up(points[0].value)));
  }
  return group;
}

function pointShape(shape, x, y) {
  if (shape === "circle") return svg("circle", { cx: x, cy: y, r: 3 });
  const [left, right, top, bottom] = [x - 3.5, x + 3.5, y - 3.5, y + 3.5];
  const corners = {
    square: [left, top, right, top, right, bottom, left, bottom],
    triangle: [x, top, right, bottom, left, bottom],
    diamond: [x, y - 4.5, x + 4.5, y, x, y + 4.5, x - 4.5, y],
  };
  return svg("polygon", { points: corners[shape].join(" ") });
}

/** Of a column of the curve: what was measured, pale, and its smoothed course. */
function courseOf(name) {
  return ({ curve }) => {
    const course = smoothed(curve.points, name, smoothingSpan(curve));
    const points = curve.points.map((point, index) => ({
      ...point,
      value: point[name],
      low: name === "loss" ? point.loss_low : null,
      high: name === "loss" ? point.loss_high : null,
      course: course[index],
    }));
    return [
      { points, style: "raw", band: name === "loss" },
      { points: points.map((point) => ({ ...point, value: point.course, low: null, high: null })), style: "smooth" },
    ];
  };
}

function smoothingSpan({ points }) {
  return points.length === 0 ? 1 : Math.max(5, (points[points.length - 1].step - points[0].step) / 50);
}

function courseReading(format) {
  return (point, withPlace = false) => {
    const said = [(point.steps > 1 ? "mean " : "") + format(point.value)];
    if (point.steps > 1 && known(point.low)) said.push(`between ${format(point.low)} and ${format(point.high)}`);
    if (known(point.course)) said.push(`smoothed ${format(point.course)}`);
    return withPlace ? `${where(point)}: ${said.join(", ")}${marksAt(point)}` : said.join(", ");
  };
}

function where({ step, steps, time }) {
  const at = view.along === "time" && known(time) ? `, ${clock(time)}` : "";
  return steps > 1 ? `steps ${count(step - steps + 1)} to ${count(step)}${at}` : `step ${count(step)}${at}`;
}

function marksAt({ step, steps }) {
  const kinds = run.marks
    .filter((mark) => mark.step > step - steps && mark.step <= step)
    .map((mark) => MARK_NAMES[mark.kind] ?? mark.kind);
  return [...new Set(kinds)].map((kind) => `; ${kind}`).join("");
}

const MARK_NAMES = { checkpoint: "checkpoint", restart: "restart of the server", codec: "another codec" };

/** A line for every client with held-out data; beyond four of them, all in one manner, without names. */
function heldOut({ evaluations }) {
  const clients = [...new Set(evaluations.map((evaluation) => evaluation.client))];
  const fewEnough = clients.length <= SHAPES.length;
  const lines = clients.map((client, index) => ({
    points: evaluations.filter((each) => each.client === client).map((each) => ({ ...each, value: each.perplexity })),
    style: "evaluation",
    shape: fewEnough ? SHAPES[index] : "circle",
    name: fewEnough && clients.length > 1 ? client : null,
  }));
  const stops = new Map(evaluations.map(({ step, time }) => [step, { step, time, steps: 1, evaluations: [] }]));
  for (const evaluation of evaluations) stops.get(evaluation.step).evaluations.push(evaluation);
  return stops.size > 0 ? [{ points: [...stops.values()].sort((a, b) => a.step - b.step), style: "stops" }, ...lines] : [];
}

function heldOutReading(stop, withPlace = false) {
  const values = stop.evaluations.map(({ perplexity }) => perplexity).filter(known);
  const said =
    values.length > SHAPES.length
      ? `${figure(Math.min(...values))} to ${figure(Math.max(...values))}`
      : stop.evaluations
          .map(({ client, perplexity }) =>
            stop.evaluations.length > 1 ? `${client} ${figure(perplexity)}` : figure(perplexity),
          )
          .join(", ");
  return withPlace ? `${where(stop)}: ${said}` : said;
}

function curveChart(parent, name, title, format, more = {}) {
  return new Chart(parent, { title, format, lines: courseOf(name), reading: courseReading(format), ...more });
}

const charts = [
  curveChart($("charts"), "loss", "Loss, nats per token", nats, { isLarge: true }),
  new Chart($("charts"), {
    title: "Held-out perplexity",
    format: figure,
    lines: heldOut,
    reading: heldOutReading,
    isLarge: true,
    empty: "No device has measured it. One that has held-out data does with --eval-data FILE --eval-every N.",
  }),
  curveChart($("charts"), "tokens_per_second", "Tokens a second", figure, { fromZero: true }),
  curveChart($("charts"), "bytes_per_second", "Bytes a second", bytes, { fromZero: true }),
  curveChart($("more-charts"), "learning_rate", "Learning rate", figure, { fromZero: true }),
  curveChart($("more-charts"), "gradient_norm", "Gradient norm", figure, { fromZero: true }),
];

function drawMarksLegend() {
  const kinds = Object.keys(MARK_NAMES).filter((kind) => run.marks.some((mark) => mark.kind === kind));
  drawSigns(
    $("marks"),
    kinds.map((kind) => [
      MARK_NAMES[kind],
      svg("g", { class: "marks" }, markSign(kind, 6, kind === "checkpoint" ? 7 : 20, 10)),
    ]),
  );
}

/** What signs in the charts mean, as [name, sign]; drawn again only where there are others. */
function drawSigns(where, signs) {
  const names = signs.map(([name]) => name).join("\n");
  show(where, signs.length > 0);
  if (where.names === names) return;
  where.names = names;
  const picture = (sign) => svg("svg", { width: 12, height: 22, "aria-hidden": "true" }, sign);
  where.replaceChildren(...signs.map(([name, sign]) => element("span", {}, picture(sign), element("bdi", {}, name))));
}

// Devices

const shownDevices = new Map();

const IN_STATE = { connected: "take part", late: "are late", lost: "have lost their connection", left: "have left" };

/** How all devices are, where only some of them are listed. */
function moreDevices({ devices = [], more_devices: more = 0, device_states: states = {} }) {
  const inState = Object.entries(IN_STATE).filter(([state]) => states[state] > 0);
  const said = inState.map(([state, words]) => `${count(states[state])} ${words}`).join(", ");
  const first = "those that are late, lost or slow come first.";
  return `Of ${count(devices.length + more)} devices, ${said}. ${count(devices.length)} are listed: ${first}`;
}

function drawDevices(overview) {
  const { devices = [], now } = overview;
  show($("more-devices"), overview.more_devices > 0);
  if (overview.more_devices > 0) say($("more-devices"), moreDevices(overview));
  const names = new Set(devices.map((device) => device.name));
  for (const [name, shown] of shownDevices) {
    if (!names.has(name)) {
      shown.item.remove();
      shownDevices.delete(name);
    }
  }
  const longest = Math.max(...devices.map((device) => total(device.seconds)), 0);
  devices.forEach((device, index) => {
    if (!shownDevices.has(device.name)) shownDevices.set(device.name, deviceRow());
    const shown = shownDevices.get(device.name);
    if ($("device-list").children[index] !== shown.item)
      $("device-list").insertBefore(shown.item, $("device-list").children[index] ?? null);
    drawDevice(shown, device, { now, longest });
  });
  show($("no-devices"), devices.length === 0);
  show($("legend"), devices.length > 0);
}

let rowsMade = 0;

function deviceRow() {
  const shown = {
    sign: element("span", { class: "sign", "aria-hidden": "true" }),
    name: element("bdi"),
    slow: element("strong", { class: "badge", hidden: true }, "▲ the slowest device"),
    words: element("p", { class: "words" }),
    bar: element("div", { class: "bar", role: "img" }, ...PARTS.map(([part]) => element("span", { class: `part ${part}` }))),
    shares: element("p", { class: "shares" }),
    numbers: element("dl", { class: "numbers" }),
  };
  shown.title = element("h3", { id: `device-${rowsMade++}`, tabindex: "-1" }, shown.sign, shown.name);
  shown.item = element(
    "li",
    {},
    element("div", { class: "title" }, shown.title, shown.slow),
    shown.words,
    shown.bar,
    shown.shares,
    shown.numbers,
  );
  return shown;
}

function total(seconds) {
  return PARTS.reduce((sum, [part]) => sum + (seconds?.[part] || 0), 0);
}

function drawDevice(shown, device, { now, longest }) {
  const [sign, words] = STATES[device.state] ?? ["?", device.state];
  shown.item.dataset.state = device.state;
  shown.item.classList.toggle("is-slow", Boolean(device.is_slowest));
  say(shown.sign, sign);
  say(shown.name, device.name);
  show(shown.slow, Boolean(device.is_slowest));
  const told = [device.words || words];
  if (device.missed_steps > 0)
    told.push(`missed ${count(device.missed_steps)} ${device.missed_steps === 1 ? "step" : "steps"}`);
  if (known(device.last_heard) && ["connected", "late"].includes(device.state))
    told.push(`last heard ${ago(device.last_heard, now)}`);
  say(shown.words, told.join(", "));

  const spent = total(device.seconds);
  const shares = PARTS.map(([part, name]) => [part, name, spent > 0 ? (device.seconds[part] || 0) / spent : 0]);
  PARTS.forEach(([part], index) => {
    shown.bar.children[index].style.width = `${longest > 0 ? (100 * (device.seconds?.[part] || 0)) / longest : 0}%`;
  });
  show(shown.bar, spent > 0);
  show(shown.shares, spent > 0);
  const largest = shares.filter(([, , value]) => value >= 0.005).sort((a, b) => b[2] - a[2]);
  const named = largest.map(([, name, value]) => `${name} ${share(value)}`);
  shown.bar.setAttribute("aria-label", `Time of its last steps: ${named.join(", ")}`);
  say(shown.shares, named.slice(0, 3).join(", "));
  sayFigures(shown.numbers, [
    ["samples", count(device.samples)],
    ["batch", count(device.batch_size)],
    ["tokens/s", figure(device.tokens_per_second)],
    ["loss", nats(device.loss)],
    ["up", bytes(device.bytes_up)],
    ["down", bytes(device.bytes_down)],
  ]);
}

function drawPartsLegend() {
  $("parts").append(
    ...PARTS.map(([part, name, meaning]) =>
      element(
        "div",
        {},
        element("dt", {}, element("span", { class: `part ${part}`, "aria-hidden": "true" }), name),
        element("dd", {}, meaning),
      ),
    ),
  );
}

// The rest of the page

function drawHeading({ run: name, sentence: state, step, total_steps: steps }) {
  say($("run"), name ? `splitlora, run ${name}` : "splitlora");
  say($("sentence"), sentence(state ?? ""));
  show($("progress"), known(steps) && steps > 0);
  if (known(steps) && steps > 0) Object.assign($("progress"), { max: steps, value: Math.min(step ?? 0, steps) });
}

function drawLink() {
  const isClosed = link.awaySince !== null;
  const isAway = isClosed && !isOver();
  document.body.classList.toggle("is-away", isAway);
  say($("link"), isAway ? "○ away" : isClosed ? "■ ended" : run.overview ? "● live" : "connecting");
  show($("away"), isClosed);
  if (isClosed) say($("away"), awayText());
}

/** Not with the next frame, as all else: there is none while nobody looks, and then the title is all that is seen. */
function drawTitle() {
  if (run.overview)
    document.title = `${link.awaySince === null || isOver() ? "" : "away: "}${run.overview.sentence ?? ""} · ${run.overview.run ?? "splitlora"}`;
}

/** Where most of the time goes, and the slowest device, which is a link to its row. */
function drawNotices({ devices = [], bottleneck }) {
  const notices = [];
  const slow = devices.find((device) => device.is_slowest);
  if (slow && known(slow.slowness) && bottleneck?.client !== slow.name) {
    notices.push(slowNotice(linkTo(slow.name), ` is ${slow.slowness.toFixed(1)} times as slow as the others.`));
  }
  if (bottleneck) {
    const text = String(bottleneck.sentence ?? "");
    const isOfDevice = shownDevices.has(bottleneck.client) && text.startsWith(bottleneck.client);
    const advice = element("em", {}, sentence(bottleneck.advice ?? ""));
    notices.push(
      isOfDevice
        ? slowNotice(linkTo(bottleneck.client), `${text.slice(bottleneck.client.length)}. `, advice)
        : element("p", { class: "notice" }, sentence(text), " ", advice),
    );
  }
  const shown = [...$("notices").children];
  notices.forEach((notice, index) => {
    if (!shown[index]) $("notices").append(notice);
    else if (!shown[index].isEqualNode(notice)) shown[index].replaceWith(notice); // else a link in it may be in focus
  });
  shown.slice(notices.length).forEach((notice) => notice.remove());
}

function slowNotice(...said) {
  return element("p", { class: "notice slow" }, element("span", { "aria-hidden": "true" }, "▲ "), ...said);
}

function linkTo(name) {
  return element("a", { href: `#${shownDevices.get(name).title.id}` }, element("bdi", {}, name));
}

function drawFigures(overview) {
  const { held_out: heldOutLoss, last_checkpoint: checkpoint, now } = overview;
  const figures = [
    ["loss", nats(overview.loss), ["nats per token", trend(run.curve.points, "loss")].filter(Boolean).join(", ")],
    [
      "held-out perplexity",
      heldOutLoss ? figure(heldOutLoss.perplexity) : NONE,
      heldOutLoss ? `after step ${count(heldOutLoss.step)}` : "not measured",
    ],
    ["tokens a second", figure(overview.tokens_per_second)],
    ["bytes a second", bytes(overview.bytes_per_second), "up and down"],
    [
      "last checkpoint",
      checkpoint ? `step ${count(checkpoint.step)}` : NONE,
      checkpoint ? ago(checkpoint.time, now) : "none yet",
    ],
  ];
  if (known(overview.started))
    figures.push([
      "running for",
      duration(now - overview.started),
      overview.restarts > 0
        ? `${count(overview.restarts)} ${overview.restarts === 1 ? "restart" : "restarts"}`
        : "without a restart",
    ]);
  sayFigures($("figures"), figures);
}

function drawCodec({ codec, codec_reason: reason }) {
  if (codec) {
    say($("codec").firstChild, codec);
    say($("codec").lastChild, reason ? `: ${reason}` : "");
  }
  drawLog($("codecs"), run.codecs);
}

/** The newest first. Whoever is in the middle of it keeps what was there. */
function drawLog(list, events) {
  if (run.isNew) list.replaceChildren();
  const before = list.logged ?? [];
  const added = run.isNew ? events : events.filter((event) => !before.includes(event));
  for (const event of added) list.prepend(logLine(event));
  while (list.children.length > events.length) list.lastChild.remove();
  list.logged = events;
}

function logLine({ time, level, text, step }) {
  const line = element("li", { class: ["warning", "error"].includes(level) ? level : null });
  if (known(time)) line.append(element("time", { datetime: new Date(1000 * time).toISOString() }, clock(time)), " ");
  if (["warning", "error"].includes(level)) line.append(element("strong", {}, level), " ");
  line.append(element("bdi", {}, String(text)));
  if (known(step)) line.append(" ", element("span", { class: "quiet" }, `step ${count(step)}`));
  return line;
}

let isDue = false;

function redraw() {
  drawTitle();
  if (isDue) return;
  isDue = true;
  requestAnimationFrame(() => {
    isDue = false;
    drawLink();
    if (!run.overview) return;
    drawHeading(run.overview);
    drawDevices(run.overview);
    drawNotices(run.overview);
    drawFigures(run.overview);
    charts.forEach((chart) => chart.draw());
    drawMarksLegend();
    drawCodec(run.overview);
    drawLog($("events"), run.events);
    show($("no-events"), run.events.length === 0);
    run.isNew = false;
  });
}

for (const name of ["along", "range"]) {
  for (const choice of document.getElementsByName(name)) {
    choice.addEventListener("change", () => {
      view[name] = name === "range" ? Number(choice.value) : choice.value;
      charts.forEach((chart) => chart.draw());
    });
  }
}

drawPartsLegend();
$("legend").open = matchMedia("(min-width: 64rem)").matches; // where there is room for it
connect();
