(() => {
  "use strict";
  const root = document.documentElement;

  // Light and dark: the system's choice until the button is pressed, then what was pressed last.
  const button = document.getElementById("theme");
  const systemDark = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.style.colorScheme || (systemDark.matches ? "dark" : "light")) === "dark";
  const label = () => { button.textContent = isDark() ? "Light mode" : "Dark mode"; };
  const storage = (action) => { try { return action(localStorage); } catch { return null; } };
  root.style.colorScheme = storage((s) => s.getItem("theme")) || "";
  button.hidden = false;
  button.addEventListener("click", () => {
    root.style.colorScheme = isDark() ? "light" : "dark";
    storage((s) => s.setItem("theme", root.style.colorScheme));
    label();
  });
  systemDark.addEventListener("change", label);
  label();

  // How strongly the maps cover their images.
  const strength = document.getElementById("strength");
  if (strength) {
    strength.parentElement.hidden = false;
    strength.addEventListener("input", () => root.style.setProperty("--strength", strength.value));
  }

  // The values of an image's maps at one place, under the pointer or chosen with the arrow keys: the level of
  // the colour that the map's own pixel has.
  const hex = root.dataset.colours;
  const levels = new Map(hex.match(/.{6}/g).map((colour, level) => [Number.parseInt(colour, 16), level]));
  const loaded = new Map();
  let place = null; // { table, x, y, said }: x and y from 0 to 1, said tells the values to who cannot see them

  const pixelsOf = (map) => {
    if (!loaded.has(map)) {
      loaded.set(map, null);
      const image = new Image();
      image.src = map.src ?? getComputedStyle(map).backgroundImage.slice(5, -2); // url("...")
      image.decode().then(() => {
        const context = new OffscreenCanvas(image.width, image.height).getContext("2d");
        context.drawImage(image, 0, 0);
        loaded.set(map, context.getImageData(0, 0, image.width, image.height));
        read();
      });
    }
    return loaded.get(map);
  };
  const valueOf = (map, x, y) => {
    const pixels = pixelsOf(map);
    if (!pixels) return "";
    const own = (name, otherwise) => Number(map.style.getPropertyValue(name) || otherwise);
    const [width, height, frame] = [own("--w", pixels.width), own("--h", pixels.height), own("--f", 0)];
    const border = (pixels.height - height) / 2;
    const within = (share, size) => border + Math.min(size - 1, Math.floor(share * size));
    const at = 4 * (within(y, height) * pixels.width + frame * (width + 2 * border) + within(x, width));
    const [red, green, blue] = pixels.data.slice(at, at + 3);
    const level = levels.get((red << 16) | (green << 8) | blue); // none where a browser blurs what it reads
    return level === undefined ? "" : (level / 255).toFixed(2);
  };
  const mapsOf = (table) => [...table.querySelectorAll(".tile > *")];
  const read = () => {
    if (!place) return;
    const { table, x, y, said } = place;
    for (const map of mapsOf(table)) map.parentElement.dataset.value = valueOf(map, x, y);
    table.classList.add("pointed");
    table.classList.toggle("low", y > 0.5);
    table.style.setProperty("--x", x);
    table.style.setProperty("--y", y);
    if (!said) return;
    const where = `${Math.round(100 * x)} % from the left, ${Math.round(100 * y)} % from the top`;
    const values = mapsOf(table).map((map) => `${map.alt ?? map.ariaLabel}: ${map.parentElement.dataset.value}`);
    said.textContent = [where, ...values].join("; ");
  };
  const leave = () => {
    place?.table.classList.remove("pointed");
    place = null;
  };
  const point = (table, x, y, said) => {
    if (place?.table !== table) leave();
    const inside = (share) => Math.max(0, Math.min(1, share));
    place = { table, x: inside(x), y: inside(y), said };
    read();
  };
  for (const table of document.querySelectorAll(".scroll.maps")) {
    for (const kind of ["pointerdown", "pointermove"])
      table.addEventListener(kind, (event) => {
        const box = event.target.closest(".tile")?.getBoundingClientRect();
        if (box) point(table, (event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height);
      });
    table.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") leave(); });
    table.addEventListener("blur", leave);
    const said = document.createElement("output");
    said.className = "unseen";
    table.before(said);
    table.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
      if (!step) return;
      const from = place?.table === table ? place : { x: 0.5, y: 0.5 };
      point(table, from.x + step[0] / 16, from.y + step[1] / 16, said);
      if (place.x !== from.x || place.y !== from.y) event.preventDefault(); // at the edge the key scrolls, as ever
    });
  }

  // The epoch whose maps are shown: of each run the last that was kept up to then.
  const slider = document.getElementById("epoch");
  if (slider) {
    const epochs = JSON.parse(slider.dataset.epochs);
    const rows = [...document.querySelectorAll("tr[data-epochs]")].map((row) => [row, JSON.parse(row.dataset.epochs)]);
    const move = () => {
      const epoch = epochs[slider.value];
      const text = `${epoch} of ${epochs.at(-1)}`;
      document.getElementById("at-epoch").textContent = text;
      slider.setAttribute("aria-valuetext", `epoch ${text}`);
      for (const [row, own] of rows) {
        const frame = Math.max(0, own.findLastIndex((kept) => kept <= epoch));
        for (const strip of row.querySelectorAll(".strip")) strip.style.setProperty("--f", frame);
      }
      read();
    };
    slider.closest(".controls").hidden = false;
    slider.addEventListener("input", move);
    move(); // a browser may keep the slider where it was before a reload
  }

  // The curves as tables, made when they are asked for.
  const cell = (tag, text, scope) => {
    const made = document.createElement(tag);
    made.textContent = text;
    if (scope) made.scope = scope;
    return made;
  };
  const line = (...cells) => {
    const made = document.createElement("tr");
    made.append(...cells);
    return made;
  };
  const asTable = (figure) => {
    const { x, series } = JSON.parse(figure.querySelector("svg").dataset.hover);
    const table = document.createElement("table");
    table.className = "chart-table";
    table.createCaption().textContent = figure.querySelector("figcaption").textContent;
    table.createTHead().append(line(cell("th", "Epoch", "col"), ...series.map(({ label }) => cell("th", label, "col"))));
    table.createTBody().append(...x.map(([epoch], i) =>
      line(cell("th", epoch, "row"), ...series.map(({ points }) => cell("td", points[i] ? points[i][0] : "–")))));
    const scroll = document.createElement("div");
    scroll.className = "scroll";
    scroll.tabIndex = 0;
    scroll.setAttribute("role", "region");
    scroll.setAttribute("aria-label", table.caption.textContent);
    scroll.append(table);
    return scroll;
  };
  for (const details of document.querySelectorAll("details.tables")) {
    details.hidden = false;
    details.addEventListener("toggle", () => {
      const figures = [...details.parentElement.querySelectorAll("figure")].filter((f) => f.querySelector("svg[data-hover]"));
      details.append(...figures.map(asTable));
    }, { once: true });
  }

  // The values under the pointer, or at the epoch chosen with the arrow keys.
  for (const svg of document.querySelectorAll("svg[data-hover]")) {
    const { x, series } = JSON.parse(svg.dataset.hover);
    const cursor = svg.querySelector(".cursor");
    const tip = svg.parentElement.querySelector(".tip");
    let at = x.length - 1;

    const show = (index) => {
      at = Math.max(0, Math.min(x.length - 1, index));
      const [epoch, pixel] = x[at];
      for (const end of ["x1", "x2"]) cursor.firstElementChild.setAttribute(end, pixel);
      cursor.setAttribute("visibility", "visible");
      tip.replaceChildren(`epoch ${epoch}`);
      cursor.querySelectorAll("circle").forEach((dot) => dot.remove());
      for (const { label, style, points } of series) {
        if (!points[at]) continue;
        const key = document.createElement("span");
        key.className = `key s-${style}`;
        tip.append("\n", key, `${label}  ${points[at][0]}`);
        const dot = document.createElementNS(svg.namespaceURI, "circle");
        for (const [name, value] of Object.entries({ cx: pixel, cy: points[at][1], r: 3.5, class: `s-${style}` }))
          dot.setAttribute(name, value);
        cursor.append(dot);
      }
      tip.hidden = false;
      const share = pixel / svg.viewBox.baseVal.width;
      const room = svg.clientWidth - tip.offsetWidth;
      tip.style.left = `${Math.max(0, Math.min(room, share * svg.clientWidth + (share > 0.5 ? -tip.offsetWidth - 12 : 12)))}px`;
    };
    const hide = () => { tip.hidden = true; cursor.setAttribute("visibility", "hidden"); };

    svg.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect();
      const pixel = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
      const distances = x.map(([, p]) => Math.abs(p - pixel));
      show(distances.indexOf(Math.min(...distances)));
    });
    svg.addEventListener("pointerleave", hide);
    svg.addEventListener("blur", hide);
    svg.addEventListener("focus", () => { if (svg.matches(":focus-visible")) show(at); });
    svg.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!step) return;
      event.preventDefault();
      show(at + step);
    });
  }
})();
