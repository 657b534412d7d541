// Filters rollouts by words and verdict, and colours tokens by the distance of one layer. The page is whole without it.
(() => {
  const controls = document.getElementById("controls");
  if (!controls) return;
  controls.hidden = false;
  const search = document.getElementById("search"), said = document.getElementById("found");
  const rollouts = [...document.querySelectorAll("[data-verdict]")].map(
    (node) => ({ node, text: node.textContent.toLowerCase() }));
  const lists = [...document.querySelectorAll("details.rollouts")];

  const filter = () => {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const verdict = controls.querySelector("input[name=verdict]:checked").value;
    let shown = 0;
    for (const { node, text } of rollouts) {
      const fits = (verdict === "all" || node.dataset.verdict === verdict) && words.every((word) => text.includes(word));
      node.hidden = !fits;
      shown += fits;
    }
    const asked = words.length > 0 || verdict !== "all";
    if (asked) for (const list of lists) list.open = list.querySelector("[data-verdict]:not([hidden])") !== null;
    said.textContent = asked ? `${shown} of ${rollouts.length} rollouts` : `${rollouts.length} rollouts`;
  };
  search.addEventListener("input", filter);
  controls.addEventListener("change", filter);
  filter();

  const layer = document.getElementById("layer"), top = document.getElementById("top");
  if (layer) layer.addEventListener("change", () => {
    for (const token of document.querySelectorAll("[data-l]")) token.className = "d" + token.dataset.l[layer.selectedIndex];
    top.textContent = layer.selectedOptions[0].dataset.top;
  });
})();
