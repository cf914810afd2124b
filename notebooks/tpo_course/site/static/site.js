// Dark and light, and the menus of a narrow page. Nothing here is needed to read.
"use strict";
(() => {
  const root = document.documentElement;
  const system = matchMedia("(prefers-color-scheme: dark)");
  let chosen = null;
  try { chosen = localStorage.getItem("theme"); } catch { /* a page from a file may keep nothing */ }
  if (chosen) root.dataset.theme = chosen;

  document.addEventListener("DOMContentLoaded", () => {
    const button = document.getElementById("theme");
    const dark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
    const name = () => { button.textContent = dark() ? "Light" : "Dark"; };
    button.hidden = false;
    name();
    system.addEventListener("change", name);
    button.addEventListener("click", () => {
      root.dataset.theme = dark() ? "light" : "dark";
      try { localStorage.setItem("theme", root.dataset.theme); } catch { /* as above */ }
      name();
    });
    if (innerWidth < 800) document.querySelector(".menu details").open = false;
    if (innerWidth < 1240) document.querySelectorAll(".contents details").forEach((each) => { each.open = false; });
    const here = document.querySelector(".menu [aria-current]");
    const menu = document.querySelector(".menu");
    if (here && innerWidth >= 800) menu.scrollTop = here.offsetTop - menu.clientHeight / 2;
  });
  let folded = [];
  addEventListener("beforeprint", () => { // on paper nothing can be unfolded: the text is, the menus are not printed
    folded = [...document.querySelectorAll("main details:not([open])")];
    folded.forEach((each) => { each.open = true; });
  });
  addEventListener("afterprint", () => folded.forEach((each) => { each.open = false; }));
})();
