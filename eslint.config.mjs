// Rules for the JavaScript of the page of `tune`; its types are those of jsconfig.json.
export default [{
  files: ["crfrefine/tune/assets/*.js", "tests/tune/*.mjs"],
  rules: {
    "eqeqeq": "error", "max-len": ["error", 100], "no-unused-vars": "error", "no-var": "error",
    "prefer-const": ["error", { destructuring: "all" }],
  },
}];
