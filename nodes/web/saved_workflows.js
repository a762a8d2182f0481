/**
 * Opens workflows that were saved with older forms of Raylight's nodes.
 *
 * A workflow holds the values of widgets by their place, so the values of a form with other widgets would stand at the
 * wrong inputs. Before ComfyUI builds the graph, they get the places of today, and a node that has another form today
 * gets the id of its old form. `nodes/older_prompts.py` does the same for prompts in the API format.
 */
import { app } from "../../scripts/app.js";

const TYPES = { INT: "number", FLOAT: "number", BOOLEAN: "boolean", STRING: "string", COMBO: "string" };

const KERNEL = "XFuser_attention";
const BEFORE_KERNEL = [
  "ray_cluster_address",
  "ray_cluster_namespace",
  "GPU",
  "ulysses_degree",
  "ring_degree",
  "cfg_degree",
  "dp_degree",
  "sync_ulysses",
  "clear_vram_after_sampling",
];
// The older forms of Ray Initializer, told apart by the place of the attention kernel.
const INITIALIZERS = [
  [...BEFORE_KERNEL, KERNEL],
  [...BEFORE_KERNEL, "FSDP", KERNEL, "skip_comm_test", "use_mmap"],
];
// Where a switch stood at the place of a degree: the workers that the other degrees leave.
const NOT_A_DEGREE = { dp_degree: 0 };

const definitions = new Map(); // of this pack's nodes, by id

/** Return [name, type, options] of each input, in the order of the widgets. */
function inputsOf(definition) {
  const { required = {}, optional = {} } = definition.input ?? {};
  return Object.entries({ ...required, ...optional }).map(([name, [type, options]]) => [
    name,
    Array.isArray(type) ? "COMBO" : type,
    options ?? {},
  ]);
}

/** Return name, type of the value and default of each widget, with those that the frontend adds. */
function widgetsOf(definition) {
  const found = [];
  for (const [name, kind, options] of inputsOf(definition)) {
    if (!(kind in TYPES)) continue;
    found.push({ name, type: TYPES[kind], preset: options.default ?? options.options?.[0] ?? null });
    if (options.control_after_generate) found.push({ name: `${name} control`, type: "string", preset: "fixed" });
  }
  return found;
}

/** Return the names that a workflow gives to its values: newer frontends save an input for each widget. */
function savedNames(node, widgets) {
  const names = (node.inputs ?? []).filter((input) => input.widget).map((input) => input.widget.name);
  if (names.length !== node.widgets_values.length) return null;
  const types = new Map(widgets.map(({ name, type }) => [name, type]));
  // Not those of a workflow that was opened wrongly and saved again.
  const fits = (name, place) => !types.has(name) || typeof node.widgets_values[place] === types.get(name);
  return names.every(fits) ? names : null;
}

/** Return the names of the values by an older form that has them at these places, or null. */
function namesByPlace(node) {
  if (node.type !== "RayInitializer") return null;
  return INITIALIZERS.find((form) => typeof node.widgets_values[form.indexOf(KERNEL)] === "string") ?? null;
}

/** Put values at today's places. Return whether it is known where they belong; null if they were there. */
function placeValues(node, definition) {
  if (!Array.isArray(node.widgets_values)) return null;
  const widgets = widgetsOf(definition);
  const types = widgets.map(({ type }) => type);
  const fits = (value, place) => value == null || !types[place] || typeof value === types[place];
  if (node.widgets_values.every(fits)) return null;
  const named = savedNames(node, widgets);
  const names = named ?? namesByPlace(node) ?? [];
  const values = new Map(names.map((name, place) => [name, node.widgets_values[place]]));
  node.widgets_values = widgets.map(({ name, type, preset }) => {
    if (typeof values.get(name) === type) return values.get(name);
    return values.has(name) ? NOT_A_DEGREE[name] ?? preset : preset;
  });
  // Forms of one length may have had other switches at these places: which are off does not matter.
  const isOn = widgets.some(({ name, type }) => type === "boolean" && values.get(name) === true);
  return named !== null || (names.length > 0 && !isOn);
}

/** Give links the names of today's inputs where only one can be meant, and drop inputs that are no more. */
function nameLinks(node, definition) {
  const inputs = inputsOf(definition);
  const today = new Set(inputs.map(([name]) => name));
  const taken = new Set((node.inputs ?? []).filter(({ link }) => link != null).map(({ name }) => name));
  for (const input of node.inputs ?? []) {
    if (input.link == null || today.has(input.name)) continue;
    const free = inputs.filter(([name, type]) => type === input.type && !taken.has(name));
    if (free.length === 1) taken.add((input.name = free[0][0]));
  }
  node.inputs = node.inputs?.filter(({ name, link }) => link != null || today.has(name));
}

function becomes(node, type) {
  node.type = type;
  if (node.properties?.["Node name for S&R"]) node.properties["Node name for S&R"] = type;
}

/** Give nodes that have no widgets today the id of the older form that had some. */
function nameForm(node) {
  const values = node.widgets_values;
  if (!Array.isArray(values) || values.length === 0) return;
  if (node.type === "XFuserSamplerCustomAdvanced") becomes(node, "XFuserSamplerCustomAdvancedSeed");
  if (node.type === "DPNoiseList") {
    becomes(node, "DPNoiseListSeeds");
    if (values.every((value) => typeof value === "number"))
      node.widgets_values = values.flatMap((seed) => [seed, "fixed"]);
  }
}

/** Put a node right, and return what to tell the user, if anything. */
function putRight(node) {
  if (!definitions.has(node.type)) return null;
  nameForm(node);
  const definition = definitions.get(node.type);
  if (!definition) return null;
  const known = placeValues(node, definition);
  nameLinks(node, definition);
  if (known === null) return null;
  const form = `node ${node.id}, ${definition.display_name}, was saved in an older form: `;
  return known
    ? { severity: "info", text: `${form}its values are at the inputs of today` }
    : { severity: "warn", text: `${form}check its values, as not all can be known` };
}

app.registerExtension({
  name: "raylight.savedWorkflows",

  beforeRegisterNodeDef(_, definition) {
    if (definition.category === "Raylight") definitions.set(definition.name, definition);
  },

  beforeConfigureGraph(graph) {
    const nodes = [graph, ...(graph?.definitions?.subgraphs ?? [])].flatMap((one) => one?.nodes ?? []);
    for (const { severity, text } of nodes.map(putRight).filter(Boolean)) {
      console[severity](`Raylight: ${text}`);
      if (severity === "warn")
        app.extensionManager?.toast?.add({ severity, summary: "Raylight", detail: text, life: 15000 });
    }
  },
});
