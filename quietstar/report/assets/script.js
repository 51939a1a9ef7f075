"use strict";
// Shows what is known of a token: on hover, and lastingly on a tap, a click or from the keyboard.
// Everything that comes from the model or the text is set as textContent, never as markup.
(() => {
  const { strings, rows } = JSON.parse(document.getElementById("data").textContent);
  const text = document.getElementById("text");
  const panel = document.getElementById("panel");
  const tokens = Array.from(text.querySelectorAll("b"));
  const places = new Map(tokens.map((token, place) => [token, place]));
  const known = rows.flatMap((row, place) => (row ? [place] : []));
  if (!known.length) return;
  let pinned = null, shown = null, stop = known[0];

  const field = (name) => panel.querySelector(`[data-field="${name}"]`);
  const signed = (x, digits) => (x === null ? "–" : x.toFixed(digits).replace(/^-(0\.?0*)$/, "$1").replace("-", "−"));
  const share = (logp) => {
    const p = 100 * Math.exp(logp);
    return p >= 9.95 ? `${p.toFixed(0)} %` : p >= 0.1 ? `${p.toFixed(1)} %` : "< 0.1 %";
  };

  function list(element, entries, actual) {
    element.replaceChildren();
    for (let i = 0; i < entries.length; i += 2) {
      const item = document.createElement("li"), name = document.createElement("bdi");
      const number = document.createElement("span"), bar = document.createElement("i");
      name.textContent = name.title = strings[entries[i]];
      number.textContent = entries[i + 1] === null ? "–" : share(entries[i + 1]);
      bar.style.setProperty("--share", `${100 * Math.exp(entries[i + 1] ?? -Infinity)}%`);
      item.classList.toggle("actual", entries[i] === actual);
      item.append(name, number, bar);
      element.append(item);
    }
  }

  function show(place) {
    if (shown !== null) tokens[shown].classList.remove("shown");
    shown = place;
    tokens[place].classList.add("shown");
    const [token, thought, weight, before, after, ...likeliest] = rows[place];
    const gain = before === null || after === null ? null : after - before;
    const probability = (logp) => (logp === null ? "–" : `${signed(logp, 2)}  (${share(logp)})`);
    field("token").textContent = strings[token];
    field("thought").textContent = strings[thought];
    field("before").textContent = probability(before);
    field("after").textContent = probability(after);
    field("gain").textContent = (gain >= 0.0005 ? "+" : "") + signed(gain, 3);
    field("gain").className = gain >= 0.0005 ? "up" : gain <= -0.0005 ? "down" : "";
    field("weight").textContent = signed(weight, 3);
    list(field("likeliest-before"), likeliest.slice(0, likeliest.length / 2), token);
    list(field("likeliest-after"), likeliest.slice(likeliest.length / 2), token);
  }

  function pin(place, focus) {
    tokens[stop].tabIndex = -1;
    pinned = stop = place;
    tokens[place].tabIndex = 0;
    if (focus) tokens[place].focus({ preventScroll: true });
    panel.classList.add("open");
    show(place);
    // A sheet over the lower half of a small screen must not hide the token.
    const token = tokens[place].getBoundingClientRect(), sheet = panel.getBoundingClientRect();
    const covered = getComputedStyle(panel).position === "fixed" ? sheet.top : innerHeight;
    if (token.bottom > covered - 8 || token.top < 8) scrollBy({ top: (token.top + token.bottom - covered) / 2 });
  }

  // The next token in a direction that something is known of: along the text, or a line up or down.
  function along(place, step) {
    for (let i = place + step; i >= 0 && i < rows.length; i += step) if (rows[i]) return i;
    return place;
  }
  function line(place, step) {
    const from = tokens[place].getBoundingClientRect();
    let best = null, top = null, distance = Infinity;
    for (let i = along(place, step), last = place; i !== last; last = i, i = along(i, step)) {
      const box = tokens[i].getBoundingClientRect();
      if ((box.top - from.top) * step < from.height / 2) continue;
      top ??= box.top;
      if (Math.abs(box.top - top) > from.height / 2) break;
      if (Math.abs(box.left - from.left) < distance) { distance = Math.abs(box.left - from.left); best = i; }
    }
    return best ?? place;
  }

  const of = (event) => {
    const place = places.get(event.target.closest("b"));
    return place !== undefined && rows[place] ? place : null;
  };
  let pointer = "";  // where it was: where the text scrolls beneath it, nothing was pointed at
  const where = (event) => `${event.clientX} ${event.clientY}`;
  document.addEventListener("pointermove", (event) => { pointer = where(event); });
  text.addEventListener("pointerover", (event) => {
    if (event.pointerType === "mouse" && where(event) !== pointer && of(event) !== null) show(of(event));
  });
  text.addEventListener("pointerleave", (event) => {
    if (event.pointerType === "mouse" && pinned !== null) show(pinned);
  });
  text.addEventListener("click", (event) => { if (of(event) !== null) pin(of(event), true); });
  text.addEventListener("focusin", (event) => { if (of(event) !== null && of(event) !== pinned) pin(of(event), false); });
  text.addEventListener("keydown", (event) => {
    const place = of(event);
    if (place === null || event.ctrlKey || event.metaKey || event.altKey) return;
    const moves = {
      ArrowRight: () => along(place, 1), ArrowLeft: () => along(place, -1), ArrowDown: () => line(place, 1),
      ArrowUp: () => line(place, -1), Home: () => known[0], End: () => known[known.length - 1],
    };
    if (!(event.key in moves)) return;
    event.preventDefault();
    pin(moves[event.key](), true);
  });
  for (const button of document.querySelectorAll("[data-token]")) {
    button.addEventListener("click", () => {
      const place = Number(button.dataset.token);
      tokens[place].scrollIntoView({ block: "center" });
      pin(place, true);
    });
  }
  const close = () => panel.classList.remove("open");
  panel.querySelector(".close").addEventListener("click", close);
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") close(); });

  for (const place of known) tokens[place].tabIndex = -1;
  panel.hidden = false;
  const first = document.querySelector("[data-token]");  // the token that gained most, so that the panel is not empty
  stop = first ? Number(first.dataset.token) : known[0];
  tokens[stop].tabIndex = 0;
  show(stop);
})();
