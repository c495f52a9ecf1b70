// Names for controls that the themes leave unnamed or name wrongly; see tests/site for what is checked.
document.addEventListener("DOMContentLoaded", () => {
  const all = (selector) => document.querySelectorAll(selector);
  const name = (selector, label) => all(selector).forEach((e) => e.setAttribute("aria-label", label));
  name(".theme-switch-button", "Switch between light and dark");
  name(".primary-toggle, .sidebar-toggle.primary-toggle", "Open or close the list of chapters");
  name(".secondary-toggle, .sidebar-toggle.secondary-toggle", "Open or close the contents of this page");
  name(".bd-sidebar-primary", "Chapters");
  all("div.bd-sidebar-primary").forEach((e) => e.setAttribute("role", "complementary"));
  name(".bd-sidebar-secondary", "Contents of this page");
  name(".search-button", "Search");
  name(".btn-fullscreen-button", "Full screen");
  // A folded cell says what it unfolds; the theme's label for all of them is the same.
  all("details > summary[aria-label]").forEach((e) => e.removeAttribute("aria-label"));
  all("table th").forEach((e) => {
    if (!e.textContent.trim()) e.replaceWith(Object.assign(document.createElement("td"), { className: e.className }));
  });
  all(".citation[role='doc-biblioentry']").forEach((e) => e.setAttribute("role", "listitem"));
  // What scrolls sideways must be reachable from the keyboard.
  const scrolling = "div.highlight pre, .cell_output pre, .cell_output .output, table, mjx-container[display=true]";
  all(scrolling).forEach((e) => {
    if (e.scrollWidth > e.clientWidth) e.setAttribute("tabindex", "0");
  });
});
