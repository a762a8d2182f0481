/**
 * Asks ComfyUI's server to start Ray when a workflow with one of Raylight's nodes is open, so that its first prompt does
 * not wait for that. See `nodes/early_ray.py`.
 */
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";

const INITIALIZERS = ["RayInitializer", "RayInitializerAdvanced"];
const AFTER_MS = 500; // the graph is complete by then, and its widgets have their values

const ours = new Set(); // ids of this pack's nodes
let asked = false;
let timer = null;

function nodesOf(graph) {
  return (graph?.nodes ?? []).flatMap((node) => [node, ...nodesOf(node.subgraph)]);
}

async function ask() {
  const found = nodesOf(app.graph).filter((node) => ours.has(node.type));
  if (asked || found.length === 0) return;
  asked = true;
  const initializer = found.find((node) => INITIALIZERS.includes(node.type));
  const inputs = Object.fromEntries((initializer?.widgets ?? []).map(({ name, value }) => [name, value]));
  try {
    const body = JSON.stringify({ initializer: initializer?.type ?? null, inputs });
    await api.fetchApi("/raylight/begin_ray", { method: "POST", body });
  } catch (error) {
    console.debug("Raylight: Ray was not started early:", error); // the prompt starts it
  }
}

app.registerExtension({
  name: "raylight.earlyRay",

  beforeRegisterNodeDef(_, definition) {
    if (definition.category === "Raylight") ours.add(definition.name);
  },

  nodeCreated(node) {
    if (asked || !ours.has(node.comfyClass ?? node.type)) return;
    clearTimeout(timer);
    timer = setTimeout(ask, AFTER_MS);
  },
});
