// What this browser remembers: recent searches and those that the user keeps. Nothing of it is sent anywhere.

const MOST = 12;

function read(name) {
  try {
    const entries = JSON.parse(localStorage.getItem(name));
    return Array.isArray(entries) ? entries.filter(entry => typeof entry?.address === "string" && typeof entry?.label === "string") : [];
  } catch {
    return [];
  }
}

function write(name, entries) {
  try {
    localStorage.setItem(name, JSON.stringify(entries));
  } catch { }   // the storage is full or forbidden: the page works without
}

// A list of {address, label}, the latest first.
function list(name, most) {
  return {
    all: () => read(name),
    has: address => read(name).some(entry => entry.address === address),
    add: (address, label) => address.length < 20_000 && write(name, [{ address, label: label.slice(0, 120) }, ...read(name).filter(entry => entry.address !== address)].slice(0, most)),
    remove: address => write(name, read(name).filter(entry => entry.address !== address)),
    clear: () => write(name, []),
  };
}

export const recent = list("recent", MOST);
export const kept = list("kept", 100);
