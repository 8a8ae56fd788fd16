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
