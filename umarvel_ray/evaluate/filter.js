
// Filters: every [data-filter] form shows the items of its list that match all of its fields.
for (const form of document.querySelectorAll("form[data-filter]")) {
  const items = [...document.querySelectorAll("#" + form.dataset.filter + " [data-item]")];
  const count = form.querySelector("output");
  const apply = () => {
    const words = (form.elements.words?.value ?? "").toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const item of items) {
      const fits = ["task", "outcome", "side"].every((name) => !form.elements[name]?.value || item.dataset[name] === form.elements[name].value);
      const text = item.textContent.toLowerCase();
      item.hidden = !(fits && words.every((word) => text.includes(word)));
      shown += !item.hidden;
    }
    for (const group of document.querySelectorAll("#" + form.dataset.filter + " details")) {
      const inside = group.querySelectorAll("[data-item]");
      group.hidden = inside.length > 0 && [...inside].every((item) => item.hidden);
      if (words.length || form.elements.outcome?.value || form.elements.task?.value) group.open = !group.hidden;
    }
    if (count) count.textContent = shown + " of " + items.length;
  };
  form.addEventListener("input", apply);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.hidden = false;
  apply();
}
