// Runs before the first paint: restores the colours that the user chose, unless they are the system's.
const theme = localStorage.getItem("theme");
if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
