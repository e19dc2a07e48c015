// What people see of an image and say about it. The second part of the script; see page.js.

const TILE_KEYS = "1234567890qwertyuiopasdfghjklv";
const ZOOMS = [1, 1.5, 2, 3, 4, 6, 8];
const VERDICT_SIGNS = { plausible: "✓", implausible: "✕", unsure: "?" };
const CHOICE_NAMES = { left: "left is better", right: "right is better", tie: "equal", both_bad: "both bad" };

function node(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children); // text stays text: nothing here is ever parsed as HTML
  return made;
}

// ---------------------------------------------------------------- viewer

function makeViewer(element, micronsPerPixel) {
  const stage = element.querySelector(".single .stage");
  const canvas = stage.querySelector(".canvas");
  const scale = stage.querySelector(".scale");
  const range = element.querySelector(".contrast input");
  const pixels = element.querySelector("[data-do=pixels]");
  let level = 0;
  let shift = { x: 0, y: 0 };
  function place() {
    const limit = (stage.clientWidth * (ZOOMS[level] - 1)) / 2;
    const within = (value) => Math.max(-limit, Math.min(limit, value));
    shift = { x: within(shift.x), y: within(shift.y) };
    canvas.style.transform = `translate(${shift.x}px, ${shift.y}px) scale(${ZOOMS[level]})`;
    element.querySelector("output.zoom").textContent = `${ZOOMS[level] * 100} %`;
    stage.toggleAttribute("data-zoomed", level > 0);
    drawScale();
  }
  function drawScale() {
    const image = canvas.querySelector("img");
    scale.hidden = !micronsPerPixel || !image?.naturalWidth || !image.clientWidth;
    if (scale.hidden) return;
    const shown = Math.min(image.clientWidth / image.naturalWidth, image.clientHeight / image.naturalHeight) * ZOOMS[level];
    const steps = [0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000];
    const fits = steps.filter((length) => (length / micronsPerPixel) * shown <= stage.clientWidth * 0.3);
    const length = fits.at(-1) ?? steps[0];
    scale.style.width = `${(length / micronsPerPixel) * shown}px`;
    scale.firstElementChild.textContent = `${length} µm`;
  }
  const zoom = (by) => {
    const next = Math.max(0, Math.min(ZOOMS.length - 1, level + by));
    shift = { x: (shift.x * ZOOMS[next]) / ZOOMS[level], y: (shift.y * ZOOMS[next]) / ZOOMS[level] };
    level = next;
    place();
  };
  const contrast = (value) => {
    range.value = value;
    element.querySelector(".page").style.setProperty("--contrast", `${range.value}%`);
  };
  function drag(event) {
    if (!(event.buttons & 1) || level === 0) return;
    shift = { x: shift.x + event.movementX, y: shift.y + event.movementY };
    place();
  }
  stage.addEventListener("pointermove", drag);
  range.addEventListener("input", () => contrast(range.value));
  new ResizeObserver(place).observe(stage);
  return {
    show(image) {
      canvas.replaceChildren(image);
      shift = { x: 0, y: 0 };
      place();
    },
    zoomIn: () => zoom(1),
    zoomOut: () => zoom(-1),
    contrast: (by) => contrast(Number(range.value) + by),
    move(x, y) {
      if (level === 0) return false;
      shift = { x: shift.x - x * 40, y: shift.y - y * 40 };
      place();
      return true;
    },
    pixels() {
      const on = element.querySelector(".page").toggleAttribute("data-pixels");
      pixels.setAttribute("aria-pressed", String(on));
    },
    reset() {
      level = 0;
      shift = { x: 0, y: 0 };
      contrast(100);
      place();
    },
  };
}

// ---------------------------------------------------------------- views

// What all views show about an entry: its class, the references of the class, and whether it is an earlier one.
function makeHeading(root, study, references) {
  const pictures = new Map();
  for (const [name, urls] of Object.entries(references)) {
    pictures.set(name, urls.map((url) => node("img", { src: url, alt: "Real image for comparison", draggable: "false" })));
  }
  let shownClass = null;
  return function show(entry, past) {
    const label = (entry.item ?? entry.items[0]).class_label;
    const text = study.classes.find((item) => item.name === label) ?? { display_name: label, description: "" };
    if (label !== shownClass) {
      shownClass = label;
      for (const place of root.querySelectorAll(".class-name")) place.textContent = text.display_name;
      root.querySelector(".description").textContent = text.description ?? "";
      const own = pictures.get(label) ?? [];
      root.querySelector(".references").hidden = own.length === 0;
      root.querySelector(".references .pictures").replaceChildren(...own);
    }
    const note = root.querySelector(".past");
    note.hidden = !past;
    note.textContent = past ?? "";
    root.querySelector(".description").hidden = Boolean(past); // in its place, so that the image does not move
    root.querySelector("[data-do=forward]").hidden = !past;
    return text;
  };
}

function makeSingleView(element, study, references, viewer) {
  const root = element.querySelector(".single");
  const heading = makeHeading(root, study, references);
  const ask = root.querySelector(".ask");
  const subtype = root.querySelector(".subtype input");
  const comment = root.querySelector(".comment textarea");
  const boxes = study.criteria.map((criterion, index) => {
    const box = node("input", { type: "checkbox", value: criterion.name });
    const key = index < 9 ? [node("kbd", {}, String(index + 1))] : [];
    const name = criterion.name.replaceAll("_", " ");
    const words = node("span", {}, node("b", {}, name.charAt(0).toUpperCase() + name.slice(1)), node("small", {}, criterion.question));
    const label = node("label", {}, box, words, ...key);
    root.querySelector(".criteria .list").append(label);
    return box;
  });
  root.querySelector(".criteria").hidden = boxes.length === 0;
  let pending = null;
  function wait(verdict) {
    pending = verdict;
    ask.hidden = !verdict;
    ask.firstElementChild.textContent = verdict ? `Why ${verdict}? Mark it below, or write a comment.` : "";
    root.toggleAttribute("data-asking", Boolean(verdict));
    press(verdict);
  }
  function press(verdict) {
    for (const button of root.querySelectorAll("[data-verdict]")) {
      button.setAttribute("aria-pressed", String(button.dataset.verdict === verdict));
    }
  }
  const answer = (verdict) => ({
    verdict,
    failed_criteria: boxes.filter((box) => box.checked).map((box) => box.value),
    subtype: subtype.value.trim() || null,
    confidence: Number(root.querySelector(".confidence input:checked")?.value) || null,
    comment: comment.value.trim() || null,
  });
  return {
    root,
    home: root.querySelector(".stage"),
    show(entry, past) {
      const text = heading(entry, past && `An earlier image: ${entry.answer ? `you said ${entry.answer.verdict}` : "you skipped it"}. ${past}`);
      viewer.show(entry.pictures[0]);
      const given = entry.answer ?? {};
      for (const box of boxes) box.checked = (given.failed_criteria ?? []).includes(box.value);
      for (const radio of root.querySelectorAll(".confidence input")) {
        radio.checked = given.confidence != null && Math.abs(Number(radio.value) - given.confidence) < 0.01;
      }
      subtype.value = given.subtype ?? "";
      comment.value = given.comment ?? "";
      const known = (text.subtypes ?? []).map((name) => node("option", { value: name }));
      root.querySelector("#pa-subtypes").replaceChildren(...known);
      wait(null);
      press(given.verdict);
    },
    // An answer that is complete, or null while a reason is missing.
    verdict(verdict) {
      const given = answer(verdict);
      const missing = study.reason_for.includes(verdict) && !given.failed_criteria.length && !given.comment;
      wait(missing ? verdict : null);
      if (missing && window.innerWidth <= 700) ask.scrollIntoView({ block: "start" }); // the list is below the image
      return missing ? null : given;
    },
    confirm() {
      return pending ? this.verdict(pending) : null;
    },
    cancel: () => wait(null),
    toggle(index) {
      if (boxes[index]) boxes[index].checked = !boxes[index].checked;
    },
    confidence(index) {
      const radio = root.querySelectorAll(".confidence input")[index];
      radio.checked = !radio.checked;
    },
    nextSubtype() {
      const names = [...root.querySelectorAll("#pa-subtypes option")].map((option) => option.value);
      if (names.length === 0) subtype.focus();
      else subtype.value = ["", ...names][(["", ...names].indexOf(subtype.value) + 1) % (names.length + 1)];
    },
    typeComment: () => comment.focus(),
  };
}

function makeGridView(element, study, references) {
  const root = element.querySelector(".grid");
  const heading = makeHeading(root, study, references);
  const tiles = root.querySelector(".tiles");
  const order = ["plausible", "implausible", "unsure"];
  let marks = [];
  function mark(index, verdict) {
    marks[index] = verdict;
    const tile = tiles.children[index];
    tile.dataset.mark = verdict;
    tile.setAttribute("aria-label", `Image ${index + 1}: ${verdict}`);
    tile.querySelector(".sign").textContent = verdict === "plausible" ? "" : `${VERDICT_SIGNS[verdict]} ${verdict}`;
  }
  const turn = (index) => index < marks.length && mark(index, order[(order.indexOf(marks[index]) + 1) % order.length]);
  tiles.addEventListener("click", (event) => {
    const tile = event.target.closest(".tile");
    if (tile) turn([...tiles.children].indexOf(tile));
  });
  return {
    root,
    home: tiles,
    show(entry, past) {
      heading(entry, past && `An earlier grid. ${past}`);
      marks = [];
      tiles.replaceChildren(
        ...entry.pictures.map((picture, index) => {
          const key = TILE_KEYS[index] ? [node("kbd", { "aria-hidden": "true" }, TILE_KEYS[index].toUpperCase())] : [];
          return node("button", { type: "button", class: "tile" }, picture, node("span", { class: "sign", "aria-hidden": "true" }), ...key);
        }),
      );
      entry.items.forEach((item, index) => mark(index, entry.answer?.[item.item_id] ?? "plausible"));
      tiles.setAttribute("tabindex", "-1");
    },
    turn,
    turnByKey: (key) => TILE_KEYS.includes(key) && turn(TILE_KEYS.indexOf(key)),
    move(x, y) {
      const all = [...tiles.children];
      const columns = getComputedStyle(tiles).gridTemplateColumns.split(" ").length;
      const at = all.indexOf(document.activeElement);
      const next = at < 0 ? 0 : at + x + y * columns;
      all[Math.max(0, Math.min(all.length - 1, next))]?.focus();
    },
    answer: (entry) => Object.fromEntries(entry.items.map((item, index) => [item.item_id, marks[index]])),
  };
}

function makePairView(element, study, references) {
  const root = element.querySelector(".pairwise");
  const heading = makeHeading(root, study, references);
  const stages = root.querySelectorAll(".side .stage");
  return {
    root,
    home: root.querySelector("h2"),
    show(entry, past) {
      heading(entry, past && `An earlier pair: ${entry.answer ? `you said ${CHOICE_NAMES[entry.answer]}` : "you skipped it"}. ${past}`);
      entry.pictures.forEach((picture, index) => stages[index].replaceChildren(picture));
      for (const button of root.querySelectorAll("[data-choice]")) {
        button.setAttribute("aria-pressed", String(button.dataset.choice === entry.answer));
      }
    },
  };
}
