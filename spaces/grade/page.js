// The grading page. gr.HTML runs keeping.js, views.js and this file, joined in that order, once, with `element` (the
// page's root) and `server` (one async method for each of the server functions in app.py). `start`, at the end, puts the
// parts together:
//
// keeping.js  call     one question to the server; `server.fn()` swallows errors, so only a proper answer counts
//             outbox   what was graded and is not known to be saved, in localStorage: survives a closed tab
//             tally    how many are done, of images and of pairs
//             sender   empties the outbox, with back-off, as long as it takes
//             queue    the next images of one way of grading, already decoded
//             timer    active, idle and hidden time, apart
// views.js    viewer   zoom, contrast, scale bar
//             views    single, grid, pairwise: show an entry, take an answer
// page.js     desk     which entry is in front: forward, undo, keep, skip
//             keys     what a key does in each view
//             the rest status, questions, progress, listeners

const TOO_SOON_MS = 250; // a click so soon after an answer is the second half of a double click
const STEPS_KEPT = 60;
const MODE_NAMES = { single: "Single", grid: "Grid", pairwise: "Pairs" };
const countOf = (count) => (count === 1 ? "1 grade" : `${count} grades`);

// ---------------------------------------------------------------- desk

// The row or rows that an answer becomes; a correction names the row that it replaces.
function rowsOf(entry, answer, timer, session) {
  const row = (item, share, supersedes, rest) => ({
    grade_id: newId(),
    item_id: item.item_id,
    mode: entry.rowMode ?? entry.mode,
    supersedes: supersedes ?? null,
    session,
    ...timer.read(share),
    ...rest,
  });
  if (entry.mode === "single") return [row(entry.item, 1, entry.ids?.[entry.item.item_id], answer)];
  if (entry.mode === "pairwise") return [row(entry.item, 1, entry.ids?.[entry.item.item_id], { choice: answer })];
  const changed = entry.items.filter((item) => entry.answer?.[item.item_id] !== answer[item.item_id]);
  return changed.map((item) => row(item, changed.length, entry.ids?.[item.item_id], { verdict: answer[item.item_id] }));
}

async function pastEntry(old) {
  const urls = old.mode === "pairwise" ? [old.left, old.right] : [old.image];
  const pictures = await Promise.all(urls.map((url) => decoded(url, "Image to grade")));
  const mode = old.mode === "pairwise" ? "pairwise" : "single"; // one row of a grid is corrected as one image
  const answer = mode === "pairwise" ? old.answer.choice : old.answer;
  return { mode, rowMode: old.mode, item: old, pictures, answer, ids: { [old.item_id]: old.answer.grade_id } };
}

function makeDesk({ call, outbox, sender, timer, views, session, onShow }) {
  const past = []; // entries in the order in which they were answered or skipped
  let at = 0; // place in `past` of the entry in front; past.length for a new one
  let queue = null;
  let askedServer = false;
  let shown = null;
  let left = -Infinity; // when the last entry was left
  const inFront = () => (at < past.length ? past[at] : queue?.front());
  function show() {
    const entry = inFront();
    const steps = past.length - at;
    const note = steps > 0 ? `Answer again to change it, X keeps it (${steps} back).` : null;
    const changed = entry !== shown; // images that arrive meanwhile must not undo what was just marked
    if (entry && changed) {
      views[entry.mode].show(entry, note);
      timer.restart();
    }
    shown = entry;
    onShow(entry, changed);
  }
  function answer(given) {
    const entry = inFront();
    if (!entry || given === null) return;
    const rows = rowsOf(entry, given, timer, session);
    entry.ids = { ...entry.ids, ...Object.fromEntries(rows.map((row) => [row.item_id, row.grade_id])) };
    entry.answer = given;
    for (const row of rows) outbox.put(row);
    if (at === past.length) {
      const stale = past.findIndex((old) => !old.answer && old.item?.item_id === entry.item?.item_id);
      if (entry.item && stale >= 0) past.splice(stale, 1); // skipped before, now answered
      past.push(queue.shift());
    } else queue.unskip(entry);
    if (past.length > STEPS_KEPT) past.shift();
    at = past.length;
    shown = null;
    left = performance.now();
    show();
    sender.kick();
    void queue.fill();
  }
  async function earlierFromServer() {
    if (askedServer) return;
    const reply = await call("past_rows", { count: 50 });
    if (!reply) return;
    askedServer = true;
    const known = new Set(past.flatMap((entry) => (entry.items ?? [entry.item]).map((item) => item.item_id)));
    const older = (reply.items ?? []).filter((item) => !known.has(item.item_id)).reverse();
    const entries = await Promise.all(older.map(pastEntry));
    past.unshift(...entries);
    at += entries.length;
  }
  return {
    show,
    answer,
    inFront,
    sinceLast: () => performance.now() - left,
    use(next) {
      queue = next;
      at = past.length;
      shown = null;
      show();
    },
    async undo() {
      if (at === 0) await earlierFromServer();
      if (at === 0) return;
      at -= 1;
      show();
    },
    forward() {
      if (at === past.length) return;
      at += 1;
      shown = null;
      show();
    },
    toFront() {
      if (at === past.length) return;
      at = past.length;
      shown = null;
      show();
    },
    skip() {
      if (at < past.length) return this.forward();
      if (!queue?.front() || queue.front().mode === "grid") return undefined;
      past.push(queue.skip());
      at = past.length;
      left = performance.now();
      show();
      void queue.fill();
      return undefined;
    },
  };
}

// ---------------------------------------------------------------- keys

function plainKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return null;
  if (event.shiftKey && !["?", "+"].includes(event.key)) return null;
  if (event.key.length > 1 || /^[ -~]$/.test(event.key)) return event.key.length > 1 ? event.key : event.key.toLowerCase();
  return event.code.startsWith("Key") ? event.code.slice(3).toLowerCase() : null; // another script's keyboard
}

const isTyping = (target) => target.matches?.("textarea, select, [contenteditable], input:not([type=checkbox], [type=radio], [type=range])");

function singleKeys(view, viewer, desk) {
  const verdicts = { p: "plausible", j: "plausible", i: "implausible", k: "implausible", u: "unsure", l: "unsure" };
  const others = {
    Enter: () => desk.answer(view.confirm()),
    q: () => view.confidence(0),
    w: () => view.confidence(1),
    e: () => view.confidence(2),
    t: () => view.nextSubtype(),
    c: () => view.typeComment(),
    s: () => desk.skip(),
    "+": viewer.zoomIn,
    "=": viewer.zoomIn,
    "-": viewer.zoomOut,
    0: viewer.reset,
    ",": () => viewer.contrast(-10),
    ".": () => viewer.contrast(10),
    v: viewer.pixels,
    ArrowLeft: () => viewer.move(-1, 0),
    ArrowRight: () => viewer.move(1, 0),
    ArrowUp: () => viewer.move(0, -1),
    ArrowDown: () => viewer.move(0, 1),
  };
  return (key) => {
    if (Object.hasOwn(verdicts, key)) desk.answer(view.verdict(verdicts[key]));
    else if (/^[1-9]$/.test(key)) view.toggle(Number(key) - 1);
    else if (Object.hasOwn(others, key)) return others[key]() !== false;
    else return false;
    return true;
  };
}

function gridKeys(view, desk) {
  const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  return (key) => {
    if (Object.hasOwn(moves, key)) view.move(...moves[key]);
    else if (key === "Enter") desk.answer(view.answer(desk.inFront()));
    else return view.turnByKey(key) !== false;
    return true;
  };
}

function pairKeys(desk) {
  const choices = { ArrowLeft: "left", ArrowRight: "right", ArrowUp: "tie", t: "tie", ArrowDown: "both_bad", b: "both_bad" };
  return (key) => {
    if (key === "s") desk.skip();
    else if (Object.hasOwn(choices, key)) desk.answer(choices[key]);
    else return false;
    return true;
  };
}

// ---------------------------------------------------------------- the page around the views

function makeStatus(element) {
  const status = element.querySelector(".status");
  const notice = element.querySelector(".notice");
  const spoken = element.querySelector(".spoken");
  let last = "";
  return {
    say: (text) => (spoken.textContent = text),
    notice(text, action) {
      notice.hidden = !text;
      notice.replaceChildren(...(text ? [node("span", {}, text)] : []), ...(action ? [action] : []));
    },
    show(server, unsent, recorded, kept, graded) {
      const away = server !== "here";
      const where = kept ? "kept in this browser" : "kept in this tab only, do not close it";
      let state = "saved";
      let words = graded ? "All saved" : "Ready";
      if (away && unsent) [state, words] = ["away", `Server not reached. ${countOf(unsent)} ${where}`];
      else if (away) [state, words] = ["away", "Server not reached, trying again"];
      else if (unsent) [state, words] = ["wait", `Sending ${countOf(unsent)}`];
      else if (recorded) [state, words] = ["recorded", `Recorded. ${countOf(recorded)} not yet saved`];
      Object.assign(status.dataset, { state, unsent, recorded });
      status.querySelector(".words").textContent = words;
      if (state !== last && state !== "wait" && (state === "away" || last === "away")) spoken.textContent = words;
      if (state !== "wait") last = state;
    },
  };
}

function askAboutScreen(element) {
  const dialog = element.querySelector("dialog.screen");
  const options = [...dialog.querySelectorAll("input[type=radio]")];
  const free = dialog.querySelector("input[type=text]");
  const remembered = (() => {
    try {
      return JSON.parse(localStorage.getItem("pathalign/screen")) ?? {};
    } catch {
      return {};
    }
  })();
  for (const option of options) option.checked = option.value === remembered.option;
  free.value = remembered.free ?? "";
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => {
      const option = options.find((item) => item.checked)?.value;
      const note = dialog.returnValue === "start" ? [option, free.value.trim()].filter(Boolean).join("; ") : "";
      if (note) {
        try {
          localStorage.setItem("pathalign/screen", JSON.stringify({ option, free: free.value.trim() }));
        } catch {
          // it is asked again next time
        }
      }
      resolve(note || null);
    });
    dialog.querySelector("[data-do=start]").addEventListener("click", () => dialog.close("start"));
    dialog.querySelector("[data-do=skip-screen]").addEventListener("click", () => dialog.close("skip"));
    dialog.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && event.target.matches("input")) dialog.close("start");
    });
    dialog.showModal();
    (options.find((option) => option.checked) ?? dialog.querySelector("[data-do=start]")).focus();
  });
}

function keepSession(session) {
  try {
    sessionStorage.setItem("pathalign/session", JSON.stringify(session));
  } catch {
    // without storage every visit is a session of its own
  }
}

async function openSession(element) {
  const session = { session_id: newId(), note: undefined };
  try {
    Object.assign(session, JSON.parse(sessionStorage.getItem("pathalign/session")) ?? {});
  } catch {
    // as above
  }
  if (session.note === undefined) session.note = await askAboutScreen(element);
  keepSession(session);
  return {
    session_id: session.session_id,
    colour_note: session.note,
    user_agent: navigator.userAgent.slice(0, 200),
    viewport: `${window.innerWidth}x${window.innerHeight}`,
    device_pixel_ratio: window.devicePixelRatio,
  };
}

function showProgress(element, progress) {
  const { done, total, today, per_hour } = progress ?? { done: 0, total: 0 };
  const bar = element.querySelector(".progress progress");
  bar.max = Math.max(1, total);
  bar.value = done;
  const pace = per_hour && today >= 10 ? ` · ${Math.round(per_hour)} an hour` : "";
  element.querySelector(".count").textContent = progress ? `${done} of ${total} · ${today} today${pace}` : "";
}

function showWaiting(element, queue, server) {
  const heading = element.querySelector(".waiting h2");
  const more = element.querySelector(".waiting .more");
  const texts = {
    loading: ["Loading images…", ""],
    busy: ["No image is free just now", "Others are looking at them. This page asks again by itself."],
    done: ["All done. Thank you!", "Every image for you in this way of grading has been graded. Z goes back to earlier ones."],
    away: ["The server is not reached", "Nothing is lost. This page goes on by itself when the server is back."],
  };
  const [title, text] = texts[server !== "here" ? "away" : (queue?.state() ?? "loading")] ?? texts.loading;
  heading.textContent = title;
  more.textContent = text;
}

// ---------------------------------------------------------------- start

async function start(element, server) {
  const page = element.querySelector(".page");
  const status = makeStatus(element);
  const link = { grader: null, state: "here" };
  let queue = null;
  let mode = null;
  let refresh = () => {};
  link.set = (state, message) => {
    const back = state === "here" && link.state !== "here";
    link.state = state;
    if (state === "here" && !back) return refresh();
    const kept = "What you graded stays in this browser and is sent then.";
    if (state === "out") status.notice(`You are signed out, or not on the list of graders. Open your invitation link again, or sign in again, in another tab. ${kept}`);
    else if (state === "other") status.notice(`Somebody else has signed in in this browser. ${message ?? ""} Reload the page to go on as that person.`);
    else status.notice("");
    if (back) void queue?.fill();
    return refresh();
  };
  link.complain = (message) => status.notice(`The server says: ${message}`);
  const call = makeCall(server, link);
  const session = await openSession(element);
  let opening;
  for (let failures = 0; !(opening = await call("open_study", { session })); failures++) {
    status.show(link.state, 0, 0, true, false);
    showWaiting(element, null, link.state);
    await pause(backOff(failures));
  }
  link.grader = opening.grader;
  keepSession({ session_id: opening.session, note: session.colour_note }); // a new one if the last was somebody else's
  const { study } = opening;
  let graded = opening.progress.done > 0;
  const outbox = makeOutbox(opening.grader);
  const tally = makeTally(outbox);
  tally.take(isPair(study.modes[0]), opening.progress);
  const timer = makeTimer();
  const viewer = makeViewer(element, study.microns_per_pixel);
  const views = {
    single: makeSingleView(element, study, opening.references, viewer),
    grid: makeGridView(element, study, opening.references),
    pairwise: makePairView(element, study, opening.references),
  };
  const onReply = (reply, pairs, submitted = false) => {
    if (reply.progress) tally.take(pairs, reply.progress, submitted);
    refresh();
  };
  const onRefused = (refused, rows) => {
    status.notice(`${countOf(refused.length)} could not be taken: ${refused[0].reason} It stays in this browser.`);
    queue.again(rows.map((row) => row.item_id));
  };
  const isAway = () => link.state !== "here";
  const sender = makeSender(call, outbox, { isAway, onReply, onRefused, onChange: () => refresh() });
  const onShow = (entry, changed) => {
    page.dataset.view = entry ? entry.mode : "loading";
    const focus = document.activeElement;
    const idle = (focus === document.body || page.contains(focus)) && !isTyping(focus);
    if (entry && changed && idle) views[entry.mode].home.focus({ preventScroll: true });
    refresh();
  };
  const desk = makeDesk({ call, outbox, sender, timer, views, session: opening.session, onShow });
  refresh = () => {
    const unsent = outbox.unsent();
    graded ||= unsent.length > 0;
    status.show(link.state, unsent.length, outbox.unsaved().length, outbox.kept(), graded);
    showProgress(element, tally.of(isPair(mode)));
    page.dataset.ready = queue?.size() ?? 0;
    if (page.dataset.view === "loading") showWaiting(element, queue, link.state);
  };
  function setMode(next) {
    if (next === mode) return;
    mode = next;
    queue?.close();
    queue = makeQueue(call, mode, outbox, { onFilled: () => desk.show(), onReply, isAway, onFailed: sender.kick });
    for (const button of element.querySelectorAll(".modes button")) {
      button.setAttribute("aria-pressed", String(button.dataset.mode === mode));
    }
    desk.use(queue);
    void queue.fill();
  }
  showStudy(element, opening, setMode);
  setMode(study.modes[0]);
  const nextMode = () => setMode(study.modes[(study.modes.indexOf(mode) + 1) % study.modes.length]);
  listen({ element, views, viewer, desk, timer, sender, outbox, nextMode, refresh: () => refresh() });
  sender.now();
}

function showStudy(element, opening, setMode) {
  const { study } = opening;
  element.querySelector("h1").textContent = study.title;
  element.querySelector(".disclaimer").textContent = study.disclaimer;
  element.querySelector(".instructions").textContent = study.instructions;
  element.querySelector(".me").textContent = opening.grader;
  element.querySelector("a.results").hidden = !opening.owner;
  for (const name of study.modes) {
    const button = node("button", { type: "button", "data-mode": name, "aria-pressed": "false" }, MODE_NAMES[name]);
    button.addEventListener("click", () => setMode(name));
    element.querySelector(".modes").append(button);
  }
  element.querySelector(".modes").hidden = study.modes.length < 2;
}

function listen({ element, views, viewer, desk, timer, sender, outbox, nextMode, refresh }) {
  const help = element.querySelector("dialog.help");
  const { single, grid } = views;
  const keys = { single: singleKeys(single, viewer, desk), grid: gridKeys(grid, desk), pairwise: pairKeys(desk) };
  const everywhere = { z: () => void desk.undo(), x: () => desk.forward(), m: nextMode, "?": () => help.showModal() };
  const actions = {
    undo: () => void desk.undo(),
    forward: () => desk.forward(),
    skip: () => desk.skip(),
    confirm: () => desk.answer(single.confirm()),
    "submit-grid": () => desk.answer(grid.answer(desk.inFront())),
    "zoom-in": viewer.zoomIn,
    "zoom-out": viewer.zoomOut,
    "reset-view": viewer.reset,
    pixels: viewer.pixels,
    "close-dialog": () => help.close(),
  };
  function onKey(event) {
    timer.input();
    const target = event.target;
    if (document.querySelector("dialog[open]")) return;
    if (event.key === "Escape") {
      if (isTyping(target)) (views[desk.inFront()?.mode]?.home ?? element).focus({ preventScroll: true });
      else if (single.root.hasAttribute("data-asking")) single.cancel();
      else desk.toFront();
      return;
    }
    if (isTyping(target)) return;
    const native = (event.key === " " && target.matches("button, input")) || (event.key.startsWith("Arrow") && target.matches("input"));
    if (event.repeat) {
      if (event.key === "Enter" || (event.key === " " && target.matches("button"))) event.preventDefault();
      return;
    }
    const key = plainKey(event);
    if (!key || native) return;
    if (key === "Enter" && target.matches("button:not(.tile)")) return; // the browser presses the button
    const mode = desk.inFront()?.mode;
    const taken = (mode && keys[mode](key)) || (Object.hasOwn(everywhere, key) && everywhere[key]() !== false);
    if (taken) event.preventDefault();
  }
  function onClick(event) {
    timer.input();
    if (event.target.closest(".open-help")) return help.showModal();
    const button = event.target.closest("[data-do], [data-verdict], [data-choice]");
    if (!button) return undefined;
    const { do: action, verdict, choice } = button.dataset;
    const final = verdict || choice || ["confirm", "submit-grid", "skip"].includes(action);
    if (final && event.detail > 0 && desk.sinceLast() < TOO_SOON_MS) return undefined;
    if (verdict) desk.answer(single.verdict(verdict));
    else if (choice) desk.answer(choice);
    else actions[action]?.();
    return undefined;
  }
  const controller = new AbortController();
  const on = (target, name, work) => target.addEventListener(name, work, { signal: controller.signal });
  on(document, "keydown", (event) => (element.isConnected ? onKey(event) : controller.abort()));
  on(element, "click", onClick);
  for (const name of ["pointermove", "pointerdown", "wheel"]) on(document, name, () => timer.input());
  on(document, "visibilitychange", () => timer.visibility());
  on(window, "online", () => sender.now());
  on(window, "storage", () => {
    outbox.read();
    refresh();
  });
}

void start(element, server);
