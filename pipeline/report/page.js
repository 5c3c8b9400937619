"use strict";
(() => {
  const form = document.querySelector(".filters");
  if (!form) return;
  const gallery = document.querySelector(".gallery");
  const further = document.querySelector(".further");
  const cards = [...gallery.children];
  const texts = cards.map((card) => card.dataset.text.toLowerCase());
  const page = 20;
  let most = page;

  const show = () => {
    const { group, text, from, to, drawn } = form.elements;
    const words = text.value.trim().toLowerCase();
    const low = from.value === "" ? -Infinity : Number(from.value);
    const high = to.value === "" ? Infinity : Number(to.value);
    const any = low === -Infinity && high === Infinity; // a card without a score shows only then
    let fit = 0;
    cards.forEach((card, i) => {
      const score = card.dataset.score === "" ? NaN : Number(card.dataset.score);
      const wanted = ["", card.dataset.group, card.dataset.heading].includes(group.value) && texts[i].includes(words) &&
        (any || (score >= low && score <= high));
      fit += wanted ? 1 : 0;
      card.hidden = !wanted || fit > most;
    });
    const shown = Math.min(fit, most);
    form.querySelector("output").value = shown < fit ? `${shown} of ${fit} pictures` : `${fit} pictures`;
    further.hidden = shown === fit;
    gallery.classList.toggle("plain", !drawn.checked);
  };

  form.addEventListener("input", () => { most = page; show(); });
  form.addEventListener("submit", (event) => event.preventDefault());
  further.addEventListener("click", () => { most += 3 * page; show(); });
  for (const [kind, lit] of [["mouseover", true], ["mouseout", false]]) {
    gallery.addEventListener(kind, (event) => {
      const line = event.target.closest(".boxes li[data-box]");
      if (line) line.closest(".card").querySelector(`rect[data-box="${line.dataset.box}"]`).classList.toggle("lit", lit);
    });
  }
  show();
})();
