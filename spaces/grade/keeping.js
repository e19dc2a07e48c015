// What must not be lost, and what must be there before it is needed. The first part of the script; see page.js.

const IDLE_AFTER_MS = 30000;
const ANSWER_WITHIN_MS = 20000;
const ASK_SAVED_EVERY_MS = 3000;
const LONGEST_PAUSE_MS = 15000;
const ROWS_AT_ONCE = 40;
const AHEAD = { single: 8, pairwise: 4, grid: 2 }; // entries kept ready
const REFILL_AT = { single: 5, pairwise: 2, grid: 1 };

const newId = () => {
  const bytes = crypto.getRandomValues(new Uint8Array(16)); // randomUUID is missing where there is no https
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
};
const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms));
const isPair = (mode) => mode === "pairwise"; // pairs are counted apart from images
const backOff = (failures) => Math.min(LONGEST_PAUSE_MS, 500 * 2 ** failures) * (0.75 + Math.random() / 2);

async function decoded(url, alt) {
  const image = node("img", { alt, draggable: "false" });
  image.src = url;
  await image.decode();
  return image;
}

// ---------------------------------------------------------------- call

function makeCall(server, link) {
  async function whatIsWrong() {
    try {
      const reply = await fetch("./whoami", { cache: "no-store", headers: { accept: "application/json" } });
      if (reply.status === 401 || reply.status === 403) return "out";
      const person = await reply.json();
      return link.grader && person.grader !== link.grader ? "other" : "gone";
    } catch {
      return "gone";
    }
  }
  return async function call(name, payload) {
    const late = pause(ANSWER_WITHIN_MS);
    const reply = await Promise.race([server[name]({ ...payload, grader: link.grader }), late]).catch(() => undefined);
    if (reply?.error === "other" || reply?.error === "out") link.set(reply.error, reply.message);
    else if (reply?.error) link.complain(reply.message);
    else if (reply && typeof reply === "object") return link.set("here"), reply;
    else link.set(await whatIsWrong());
    return undefined;
  };
}

// ---------------------------------------------------------------- outbox

function makeOutbox(grader) {
  const prefix = `pathalign/${grader}/`;
  const rows = new Map(); // grade id -> { key, row, recorded }
  let kept = true;
  let sequence = 0;
  const guarded = (work) => {
    try {
      work();
    } catch {
      kept = false; // no storage, or it is full: the rows stay in this tab
    }
  };
  function read() {
    guarded(() => {
      for (const key of Object.keys(localStorage).filter((name) => name.startsWith(prefix)).sort()) {
        const stored = JSON.parse(localStorage.getItem(key));
        if (stored?.row && !rows.has(stored.row.grade_id)) rows.set(stored.row.grade_id, { key, ...stored });
      }
    });
  }
  const write = ({ key, row, recorded }) => guarded(() => localStorage.setItem(key, JSON.stringify({ row, recorded })));
  function mark(ids, recorded) {
    for (const id of ids) {
      const entry = rows.get(id);
      if (!entry || entry.recorded === recorded) continue;
      entry.recorded = recorded;
      entry.fresh = false;
      write(entry);
    }
  }
  read();
  return {
    read,
    kept: () => kept,
    put(row) {
      const key = `${prefix}${String(Date.now()).padStart(15, "0")}-${String(sequence++).padStart(6, "0")}-${row.grade_id}`;
      rows.set(row.grade_id, { key, row, recorded: false, fresh: !row.supersedes });
      write(rows.get(row.grade_id));
    },
    markRecorded: (ids) => mark(ids, true),
    markUnsent: (ids) => mark(ids, false),
    remove(ids) {
      for (const id of ids) {
        const entry = rows.get(id);
        rows.delete(id);
        if (entry) guarded(() => localStorage.removeItem(entry.key));
      }
    },
    setAside(ids) {
      for (const id of ids) {
        const entry = rows.get(id);
        if (entry) guarded(() => localStorage.setItem(`pathalign-refused/${id}`, JSON.stringify(entry.row)));
      }
      this.remove(ids);
    },
    unsent: () => [...rows.values()].filter((entry) => !entry.recorded).map((entry) => entry.row),
    // Rows given here that no answer to `submit_rows` has counted; of what was found in storage the server may know more.
    fresh: (pairs) => [...rows.values()].filter((entry) => entry.fresh && isPair(entry.row.mode) === pairs).length,
    unsaved: () => [...rows.values()].filter((entry) => entry.recorded).map((entry) => entry.row.grade_id),
  };
}

// ---------------------------------------------------------------- tally

// How many are done. Answers overtake one another: an older one may come last, and one to `next_items` may count a row
// whose own answer is still on its way. So fresh rows are added only to what the last answer to `submit_rows` counted,
// and the highest count is kept of all others. What is shown falls only when a row was refused, or given in two tabs.
function makeTally(outbox) {
  const counts = {}; // by whether pairs are counted
  return {
    take(pairs, progress, submitted) {
      const before = counts[pairs] ?? { settled: progress.done, newest: progress };
      counts[pairs] = {
        settled: submitted ? progress.done : before.settled,
        newest: progress.done >= before.newest.done ? progress : before.newest,
      };
    },
    of(pairs) {
      if (!counts[pairs]) return null;
      const { settled, newest } = counts[pairs];
      const done = Math.max(newest.done, settled + outbox.fresh(pairs));
      return { ...newest, done, today: newest.today + done - newest.done, total: Math.max(newest.total, done) };
    },
  };
}

// ---------------------------------------------------------------- sender

function makeSender(call, outbox, { isAway, onReply, onRefused, onChange }) {
  let busy = false;
  let failures = 0;
  let waiting = null;
  async function send() {
    const unsent = outbox.unsent();
    const pairs = isPair(unsent[0].mode); // an answer counts images or pairs
    const rows = unsent.filter((row) => isPair(row.mode) === pairs).slice(0, ROWS_AT_ONCE);
    const reply = await call("submit_rows", { rows });
    if (!reply) return false;
    const sent = new Set(rows.map((row) => row.grade_id));
    const echoed = (ids) => (ids ?? []).filter((id) => sent.has(id) || outbox.unsaved().includes(id));
    outbox.markRecorded(echoed(reply.recorded));
    outbox.remove(echoed(reply.saved));
    const refused = (reply.refused ?? []).filter((item) => sent.has(item.grade_id));
    outbox.setAside(refused.map((item) => item.grade_id));
    if (refused.length) onRefused(refused, rows);
    onReply(reply, pairs, true);
    return (reply.recorded ?? []).length + refused.length > 0; // an answer about other rows is no progress
  }
  async function askSaved() {
    const reply = await call("saved_rows", { grade_ids: outbox.unsaved().slice(0, 500) });
    if (!reply) return false;
    outbox.remove(reply.saved ?? []);
    outbox.markUnsent(reply.unknown ?? []); // a server whose disk was wiped has forgotten them
    return true;
  }
  async function round() {
    if (busy) return;
    busy = true;
    clearTimeout(waiting);
    waiting = null;
    let good = true;
    while (good && outbox.unsent().length) {
      good = await send();
      onChange();
    }
    if (good && (outbox.unsaved().length || isAway())) good = await askSaved(); // also to learn that it is back
    busy = false;
    failures = good ? 0 : failures + 1;
    onChange();
    if (good && outbox.unsent().length) void round();
    else if (!good) waiting = setTimeout(round, backOff(failures));
    else if (outbox.unsaved().length) waiting = setTimeout(round, ASK_SAVED_EVERY_MS);
  }
  // while the server is away the back-off decides, not every new grade
  const kick = () => void (waiting === null || failures === 0 ? round() : undefined);
  return { kick, now: () => void round() };
}

// ---------------------------------------------------------------- queue

function makeQueue(call, mode, outbox, { isAway, onFilled, onReply, onFailed }) {
  const ready = [];
  const seen = new Set(); // every item that came, so that none comes twice
  const skipped = new Set();
  let filling = false;
  let state = "loading"; // loading, ready, busy (all handed out to others), done
  let closed = false;
  async function entryOf(items) {
    if (mode === "grid") {
      const pictures = await Promise.all(items.map((item) => decoded(item.image, "Image to grade")));
      return { mode, items, pictures, answer: null };
    }
    const [item] = items;
    const urls = mode === "single" ? [item.image] : [item.left, item.right];
    const pictures = await Promise.all(urls.map((url) => decoded(url, "Image to grade")));
    return { mode, item, pictures, answer: null };
  }
  const itemIds = (entry) => (entry.items ?? [entry.item]).map((item) => item.item_id);
  async function fetchMore() {
    const unsent = outbox.unsent().map((row) => row.item_id);
    const exclude = [...new Set([...unsent, ...skipped, ...ready.flatMap(itemIds)])];
    const count = state === "loading" ? 2 : AHEAD[mode] - ready.length; // the first image soon, then the others
    const reply = await call("next_items", { mode, count, exclude });
    if (!reply) return "failed";
    onReply(reply, isPair(mode));
    const fresh = (reply.items ?? []).filter((item) => !seen.has(item.item_id) && !unsent.includes(item.item_id));
    if (fresh.length === 0 && skipped.size && ready.length === 0) {
      for (const id of skipped) seen.delete(id); // nothing else is left: what was skipped comes again
      skipped.clear();
      return "more";
    }
    for (const item of fresh) seen.add(item.item_id);
    const groups = mode === "grid" ? (fresh.length ? [fresh] : []) : fresh.map((item) => [item]);
    for (const group of groups) {
      ready.push(await entryOf(group));
      onFilled();
    }
    state = ready.length ? "ready" : reply.done ? "done" : "busy";
    return fresh.length ? "more" : "empty";
  }
  async function fill() {
    if (filling || closed || ready.length > REFILL_AT[mode]) return;
    if (isAway() && ready.length) return; // it is filled when the server is back
    filling = true;
    let failures = 0;
    while (!closed && ready.length < AHEAD[mode]) {
      const outcome = await fetchMore();
      if (closed) return;
      if (ready.length === 0) onFilled();
      if (outcome === "failed") onFailed();
      if (outcome === "more") failures = 0;
      else if (ready.length || state === "done") break; // enough for now; the next grade asks again
      else await pause(backOff(++failures));
    }
    filling = false;
  }
  return {
    fill,
    front: () => ready[0],
    shift: () => ready.shift(),
    skip() {
      const entry = ready.shift();
      skipped.add(entry.item.item_id);
      return entry;
    },
    unskip: (entry) => skipped.delete(entry.item?.item_id),
    again: (ids) => ids.forEach((id) => seen.delete(id)), // what was refused may come again
    state: () => state,
    size: () => ready.length,
    close: () => (closed = true),
  };
}

// ---------------------------------------------------------------- timer

function makeTimer(now = () => performance.now()) {
  let mark = now();
  let lastInput = mark;
  let spent = { active: 0, idle: 0, hidden: 0 };
  let hidden = document.hidden;
  function settle() {
    const time = now();
    if (hidden) spent.hidden += time - mark;
    else {
      const active = Math.max(0, Math.min(time, lastInput + IDLE_AFTER_MS) - mark);
      spent.active += active;
      spent.idle += time - mark - active;
    }
    mark = time;
  }
  return {
    input() {
      settle();
      lastInput = mark;
    },
    visibility() {
      settle();
      hidden = document.hidden;
      if (!hidden) lastInput = mark;
    },
    restart() {
      mark = lastInput = now();
      spent = { active: 0, idle: 0, hidden: 0 };
    },
    read(share = 1) {
      settle();
      const ms = (value) => Math.round(value / share);
      return { active_ms: ms(spent.active), idle_ms: ms(spent.idle), hidden_ms: ms(spent.hidden) };
    },
  };
}
