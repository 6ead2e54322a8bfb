"""Parameters: defaults and presets, files that round trip, dotted keys, errors with the key."""

import dataclasses
import re
import stat
import tomllib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crfrefine.errors import ConfigError
from crfrefine.parameters.files import CONFIGS, list_presets, parse_override
from crfrefine.parameters.model import CrfParameters
from crfrefine.parameters.sections import (
    KERNELS,
    SECTIONS,
    BilateralParameters,
    CompatibilityParameters,
    IntensityParameters,
    MeanFieldParameters,
    PostprocessParameters,
    SpatialParameters,
)
from crfrefine.parameters.specs import KernelSpec

MATRIX = "[compatibility]\nkind = 'matrix'\nmatrix = "
PRESETS = list_presets()


def _two_kernels():
    return CrfParameters(
        bilateral=(BilateralParameters(), BilateralParameters(weight=1.0, theta_alpha=6.0))
    )


def test_the_presets_are_there_and_the_first_is_the_default():
    assert {*PRESETS} >= {"default", "brats", "hippocampus", "body-ct", "body-mr"}
    assert ["default", *sorted({*PRESETS} - {"default"})] == PRESETS
    default = CrfParameters.from_toml((CONFIGS / "default.toml").read_text(encoding="utf-8"))
    assert default == CrfParameters.load("default") == CrfParameters()
    with pytest.raises(
        ConfigError, match="hipocampus: no such file or preset; presets: default, body-ct, "
    ):
        CrfParameters.load("hipocampus")


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_says_what_it_is_for(name):
    """It begins with a comment, says where its values are from, and ends as a parameter file does.

    A file that is written has every table, with the comment of each key.
    """
    parameters = CrfParameters.load(name)
    text = (CONFIGS / f"{name}.toml").read_text(encoding="utf-8")
    assert text.startswith("# ")
    table = tomllib.loads(text)
    assert table.keys() | {"strokes"} == {"schema", *SECTIONS}
    assert CrfParameters.from_dict(table) == parameters
    assert text.endswith(f"\n\n{parameters.to_toml()}"), "expected the text of `to_toml()`"
    assert not parameters.postprocess.removing, "no preset may remove an organ"
    assert re.search(
        "[Nn]ot trained|[Tt]rained with train-crf|values are those of|default values", text
    )


@given(
    st.lists(st.floats(-1e6, 1e6, allow_nan=False), min_size=1, max_size=4), st.floats(1e-6, 1e6)
)
@settings(deadline=None, max_examples=25)
def test_what_is_written_reads_back_equal(numbers, positive):
    """To the last bit of every number, in every form that a file can have."""
    first = numbers[0]
    pair = (min(abs(first), 40.0), 60.0)
    matrix = [
        [0.0 if row == column else value for column, value in enumerate(numbers)]
        for row in range(len(numbers))
    ]
    plain = CrfParameters(
        intensity=IntensityParameters("window", (1.0, 98.5), pair, "nonzero"),
        bilateral=BilateralParameters(first, positive, positive),
        spatial=SpatialParameters(first, positive),
        mean_field=MeanFieldParameters(7, positive / 2e6, positive, pair[0]),
        postprocess=PostprocessParameters("each", positive, "foreground"),
    )
    lists = CrfParameters(
        intensity=IntensityParameters(
            ["none", "window", "percentile"], [pair, (1.0, 99.0)], [pair, (-3.5, 7.0)]
        ),
        bilateral=(
            BilateralParameters(numbers, [positive, 1.0], positive),
            BilateralParameters(first, positive, [positive] * 3),
        ),
        spatial=SpatialParameters(numbers, [positive, 2.0]),
        compatibility=CompatibilityParameters("matrix", matrix),
        mean_field=MeanFieldParameters(bias=pair),
        postprocess=PostprocessParameters(
            ["foreground", "none", "each"], [positive, 0.0], ["none", "each"]
        ),
    )
    for parameters in (plain, lists):
        assert CrfParameters.from_toml(parameters.to_toml("a comment\nof two lines")) == parameters
        assert CrfParameters.from_dict(parameters.to_dict()) == parameters


def test_save_and_load_round_trip(tmp_path):
    path = tmp_path / "params.toml"
    CrfParameters().save(path)
    parameters = _two_kernels()
    parameters.save(path, "fitted on 12 cases")
    assert CrfParameters.load(path) == CrfParameters.load(str(path)) == parameters
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# fitted on 12 cases\n")
    assert all(
        "#" in line for line in text.splitlines() if "=" in line and not line.startswith("schema")
    ), "each key has a comment"
    assert [entry.name for entry in tmp_path.iterdir()] == ["params.toml"]
    plain = tmp_path / "plain"
    plain.touch()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


def test_the_names_of_the_cases_that_values_were_learned_on_are_kept(tmp_path):
    """Through files, tables and changes of other values; without names, nothing is written."""
    names = ("case 1", 'a "b", c', "ä", r"d\udce9", "e\x7ff\x01g")
    learned = dataclasses.replace(CrfParameters(), trained_on=list(names))
    learned.save(tmp_path / "p.toml")
    changed = CrfParameters.load(tmp_path / "p.toml").replace(**{"spatial.weight": 2.0})
    assert changed.trained_on == CrfParameters.from_dict(changed.to_dict()).trained_on == names
    assert "trained_on" not in CrfParameters().to_toml()
    assert "trained_on" not in CrfParameters().to_dict()
    for wrong in ("'case1'", "[1]", "true"):
        with pytest.raises(ConfigError, match="trained_on: expected a list of names, got "):
            CrfParameters.from_toml(f"trained_on = {wrong}")
    with pytest.raises(ConfigError, match="trained_on: expected a list of names, got "):
        dataclasses.replace(CrfParameters(), trained_on=("a\udce9",))  # no file could hold it


def test_a_comment_that_does_not_print_leaves_a_file_that_is_read_back(tmp_path):
    CrfParameters().save(tmp_path / "p.toml", "from x\x01y\x7f and z\udcff.toml\nsecond line")
    assert CrfParameters.load(tmp_path / "p.toml") == CrfParameters()
    first, second = (tmp_path / "p.toml").read_text(encoding="utf-8").splitlines()[:2]
    assert (first, second) == (r"# from x\x01y\x7f and z\udcff.toml", "# second line")


def test_a_file_that_cannot_be_read_or_written_is_named(tmp_path):
    with pytest.raises(
        ConfigError, match=r"missing/params\.toml: cannot be written: there is no folder .*missing"
    ):
        CrfParameters().save(tmp_path / "missing" / "params.toml")
    with pytest.raises(ConfigError, match="is not a regular file"):
        CrfParameters.load(tmp_path)
    path = tmp_path / "image.toml"
    for content, message in (
        (b"\x89PNG\xff\xfe", r"image\.toml: cannot be read"),
        (b"[bilateral\nweight = 1\n", r"image\.toml: not valid TOML: .*line 1"),
        (
            b"[bilateral]\nweigth = 1\n",
            r"image\.toml: bilateral\.weigth: unknown key; did you mean 'weight'\?",
        ),
    ):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=message):
            CrfParameters.load(path)
    path.write_bytes(
        b"\xef\xbb\xbf[mean_field]\nnum_iterations = 3\n"
    )  # a byte order mark; what is left out has its default
    assert CrfParameters.load(path) == CrfParameters().replace(**{"mean_field.num_iterations": 3})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[bilaterl]\nweight = 1", r"bilaterl: unknown key; did you mean 'bilateral'\?"),
        (
            "[mean_field]\nzzz = 3",
            r"mean_field\.zzz: unknown key; known: num_iterations, tolerance",
        ),
        ("schema = 2", r"schema: expected 1, got 2; the file is from another version"),
        ("bilateral = 3", r"bilateral: expected a table of keys, got 3"),
        ("[bilateral]\ntheta_alpha = 0", r"bilateral\.theta_alpha: must be greater than 0, got 0"),
        ("[bilateral]\nweight = true", r"bilateral\.weight: expected a number, got True"),
        ("[[bilateral]]\n[[bilateral]]\ntheta = -1", r"bilateral\.1\.theta: unknown key"),
        (
            "[intensity]\nnormalization = 'z-score'",
            r"intensity\.normalization: expected one of none, zscore, .*; got 'z-score'$",
        ),
        (
            "[intensity]\npercentiles = [99.0, 1.0]",
            r"intensity\.percentiles: the first number must be smaller",
        ),
        (
            "[intensity]\npercentiles = [1.0, [99.0]]",
            r"intensity\.percentiles\[1\]: expected a number, got \[99\.0\]",
        ),
        (
            "[intensity]\nnormalization = 'window'",
            r"intensity\.window: needed by intensity\.normalization = 'window'",
        ),
        ("[compatibility]\nkind = 'matrix'", r"compatibility\.matrix: needed by"),
        (
            "[compatibility]\nmatrix = [[0.0, 1.0], [1.0, 0.0]]",
            r"compatibility\.matrix: not used by compatibility\.kind = 'potts'",
        ),
        (
            f"{MATRIX}[[0.0, 1.0], [1.0, 0.5]]",
            r"compatibility\.matrix\[1\]\[1\]: the diagonal must be zero",
        ),
        (
            f"{MATRIX}[[0.0, 1.0], [1.0]]",
            r"compatibility\.matrix: expected a square matrix .*\[1\.0\]\]",
        ),
        (
            f"{MATRIX}[[0.0, nan], [1.0, 0.0]]",
            r"compatibility\.matrix\[0\]\[1\]: expected a finite number",
        ),
        (
            "[mean_field]\nnum_iterations = 0",
            r"mean_field\.num_iterations: must be at least 1 and at most 1000000, got 0",
        ),
        (
            "[mean_field]\nnum_iterations = 5.0",
            r"mean_field\.num_iterations: expected a whole number, got 5\.0",
        ),
        ("[mean_field]\noutput_temperature = 0.009", r"mean_field\.output_temperature: "),
        (
            "[mean_field]\nbias = [0.0, 1001]",
            r"mean_field\.bias\[1\]: must be at least -1000 and at most 1000, got 1001",
        ),
        (
            "[mean_field]\ndamping = 0.0",
            r"mean_field\.damping: this key is gone: each step is the plain parallel update; "
            "leave it out",
        ),
        (
            "[postprocess]\nkeep_largest = ['each', 'none']",
            r"postprocess\.keep_largest\[0\]: expected one of none, foreground; got 'each'",
        ),
        ("[postprocess]\nkeep_largest = []", r"postprocess\.keep_largest: the list is empty"),
        (
            "[postprocess]\nmin_component_ml = [0.0, -1]",
            r"postprocess\.min_component_ml\[1\]: must be at least 0, got -1",
        ),
    ],
)
def test_a_wrong_value_is_refused_by_the_name_of_its_key(text, message):
    with pytest.raises(ConfigError, match="^" + message):
        CrfParameters.from_toml(text)


def test_values_are_checked_from_python_too():
    with pytest.raises(ConfigError, match="bilateral: expected one kernel or several"):
        CrfParameters(bilateral=())
    with pytest.raises(
        ConfigError, match=r"expected a dictionary of sections, as to_dict returns, got \[\]"
    ):
        CrfParameters.from_dict([])
    with pytest.raises(ConfigError, match="spatial: expected SpatialParameters"):
        CrfParameters(spatial=BilateralParameters())
    assert CrfParameters(bilateral=BilateralParameters(weight=2.0)).bilateral == (
        BilateralParameters(weight=2.0),
    )
    matrix = CompatibilityParameters("matrix", ((0.0, -1.0), (2.0, 0.0))).matrix
    assert matrix == ((0.0, -1.0), (2.0, 0.0)), "training may find asymmetric and negative ones"


def test_numpy_values_are_plain_numbers_afterwards():
    changes = {
        "bilateral.weight": np.array([1.0, 2.5], dtype=np.float32),
        "mean_field.num_iterations": np.int64(7),
    }
    parameters = CrfParameters().replace(**changes)
    assert parameters.bilateral[0].weight == (1.0, 2.5)
    assert type(parameters.mean_field.num_iterations) is int
    assert CrfParameters.from_toml(parameters.to_toml()) == parameters


def test_replace_changes_entries_and_sections_of_a_copy_and_names_one_of_several_kernels():
    before = CrfParameters()
    two = _two_kernels()
    after = before.replace(
        spatial=SpatialParameters(weight=2.0),
        **{"bilateral.theta_alpha": 2.0, "mean_field.temperature": 0.5},
    )
    assert (after.bilateral[0], after.mean_field.temperature, after.spatial.weight) == (
        BilateralParameters(theta_alpha=2.0),
        0.5,
        2.0,
    )
    assert before == CrfParameters()
    changed = two.replace(**{"bilateral.1.weight": 2.0}).bilateral
    assert (changed[0], changed[1].weight) == (two.bilateral[0], 2.0)
    # Sections first, then entries, whatever the order they are given in.
    fine_and_coarse = before.replace(
        **{"bilateral.1.theta_alpha": 9.0, "bilateral": [{}, BilateralParameters(weight=1.0)]}
    )
    assert [kernel.theta_alpha for kernel in fine_and_coarse.bilateral] == [1.5, 9.0]
    for parameters, key, message in (
        (
            two,
            "bilateral.weight",
            r"bilateral\.weight: there are 2 kernels; "
            r"say which: bilateral\.0\.weight, bilateral\.1\.weight",
        ),
        (
            two,
            "bilateral.2.weight",
            r"bilateral\.2\.weight: expected the number of a kernel from 0 to 1",
        ),
        (
            before,
            "bilateral.1.weight",
            r"bilateral\.1\.weight: expected the number of a kernel from 0 to 0",
        ),
        (two, "bilateral.1.theta_alpha", r"^bilateral\.1\.theta_alpha: must be greater than 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            parameters.replace(**{key: -1.0})


def test_going_back_to_potts_drops_the_matrix():
    """`--set compatibility.kind=potts` on a trained file needs no second option."""
    trained = CrfParameters(
        compatibility=CompatibilityParameters("matrix", ((0.0, 1.0), (2.0, 0.0)))
    )
    assert (
        trained.replace(**{"compatibility.kind": "potts"}).compatibility
        == CompatibilityParameters()
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" bilateral.theta_alpha = 6.5 ", ("bilateral.theta_alpha", 6.5)),
        ("bilateral.theta_beta=[0.1, 0.2]", ("bilateral.theta_beta", [0.1, 0.2])),
        ("mean_field.filter=lattice", ("mean_field.filter", "lattice")),
        ('mean_field.filter="lattice"', ("mean_field.filter", "lattice")),
        ("bilateral.weight", r"expected KEY=VALUE, e\.g\."),
        ("bilateral.weight=", "expected KEY=VALUE"),
        ("bilateral.weight=[1, 2", r"bilateral\.weight: cannot read the value"),
        ("intensity.normalization=[window, zscore]", 'in lists words in "quotes"'),
        ("bilateral.weight=1\nother = 2", r"bilateral\.weight: expected one value"),
    ],
)
def test_overrides_are_toml_with_bare_words_and_others_say_why_they_are_not(text, expected):
    if isinstance(expected, tuple):
        assert parse_override(text) == expected
        return
    with pytest.raises(ConfigError, match=expected):
        parse_override(text)


def test_resolve_spreads_single_numbers_and_recognizes_potts():
    resolved = CrfParameters().resolve(num_labels=3, num_modalities=2, num_dims=4)
    run = resolved.mean_field
    assert resolved.kernels.kernels == (KernelSpec("bilateral", (1.5,) * 4, (0.05,) * 2),)
    np.testing.assert_array_equal(run.weights, np.full((1, 3), 4.0))
    np.testing.assert_array_equal(run.compatibility, 1.0 - np.eye(3))
    assert run.weights.dtype == run.compatibility.dtype == np.float32
    assert (run.is_potts, run.bias) == (True, None)
    matrix = CrfParameters(
        compatibility=CompatibilityParameters("matrix", ((0.0, 1.0), (1.0, 0.0)))
    )
    assert matrix.resolve(2, 1, 3).mean_field.is_potts
    other = (
        matrix.replace(**{"compatibility.matrix": [[0.0, 2.0], [1.0, 0.0]]})
        .resolve(2, 1, 3)
        .mean_field
    )
    assert not other.is_potts
    np.testing.assert_array_equal(other.compatibility, [[0.0, 2.0], [1.0, 0.0]])


def test_resolve_keeps_lists_in_their_order_and_drops_terms_without_weight():
    changes = {
        "bilateral": [
            {"weight": [0.0, 0.0, 0.0]},
            {"weight": [1, 2, 3], "theta_alpha": [1, 2], "theta_beta": [0.1]},
        ],
        "spatial.weight": [0.0, 0.0, 1.0],
        "spatial.theta_gamma": [3, 4],
        "mean_field.bias": [0.0, 0.5, -2.0],
    }
    resolved = CrfParameters().replace(**changes).resolve(3, 1, 2)
    np.testing.assert_array_equal(resolved.mean_field.weights, [[1, 2, 3], [0, 0, 1]])
    np.testing.assert_array_equal(resolved.mean_field.bias, [0.0, 0.5, -2.0])
    assert resolved.kernels.kernels == (
        KernelSpec("bilateral", (1, 2), (0.1,)),
        KernelSpec("spatial", (3, 4)),
    )
    none = {"spatial.weight": 0.0, "mean_field.bias": [0, 0.0, -0.0]}
    resolved = CrfParameters().replace(**changes).replace(**none).resolve(3, 1, 2)
    assert resolved.kernels.names == ("bilateral.0",)
    assert resolved.mean_field.bias is None


@pytest.mark.parametrize("kind", KERNELS)
def test_a_table_of_each_kind_of_kernel_is_resolved(kind):
    keys = KERNELS[kind].bandwidths()
    given = {"axis": (3.0, 4.0), "modality": (0.5, 0.6, 0.7)}
    changes = {"bilateral.weight": 0.0, f"{kind}.weight": 2.0}
    changes |= {f"{kind}.{key}": given[per] for key, per in keys.items()}
    resolved = CrfParameters().replace(**changes).resolve(2, 3, 2)
    assert resolved.kernels.kernels == (KernelSpec(kind, *[given[per] for per in keys.values()]),)
    np.testing.assert_array_equal(resolved.mean_field.weights, [[2.0, 2.0]])


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "bilateral.weight",
            [1.0, 2.0],
            "it has 2 values, but the case has 3 labels; give one value for all, or one per label",
        ),
        ("bilateral.theta_alpha", [1.0], "it has 1 value, but the case has 3 axes"),
        ("bilateral.theta_beta", [0.1] * 4, "it has 4 values, but the case has 2 modalities"),
        ("spatial.weight", [1.0] * 4, "it has 4 values, but the case has 3 labels"),
        ("spatial.theta_gamma", [1.0] * 2, "it has 2 values, but the case has 3 axes"),
        ("intensity.normalization", ["zscore"], "it has 1 value, but the case has 2 modalities"),
        (
            "intensity.percentiles",
            [[1.0, 99.0]] * 3,
            "it has 3 values, but the case has 2 modalities",
        ),
        ("mean_field.bias", [0.5], "it has 1 value, but the case has 3 labels"),
        ("postprocess.min_component_ml", [0.0, 0.1], "it has 2 values, but the case has 3 labels"),
        (
            "postprocess.keep_largest",
            ["none", "each"],
            "it has 2 values, but the case has 3 labels; give one value for all",
        ),
        ("postprocess.fill_holes", ["none"], "it has 1 value, but the case has 3 labels"),
        (
            "compatibility.matrix",
            [[0.0, 1.0], [1.0, 0.0]],
            "it is 2 x 2, but the case has 3 labels",
        ),
    ],
)
def test_resolve_refuses_lists_of_the_wrong_length(key, value, message):
    needed = {"compatibility.matrix": {"compatibility.kind": "matrix"}}
    with pytest.raises(ConfigError, match=f"^{re.escape(key)}: {message}"):
        CrfParameters().replace(**needed.get(key, {}), **{key: value}).resolve(
            num_labels=3, num_modalities=2, num_dims=3
        )


def test_positions_decide_the_distance_between_voxels():
    parameters = CrfParameters()
    assert parameters.resolve(2, 1, 3).kernels.distances((0.5, 1.0, 3)) == (0.5, 1.0, 3.0)
    voxels = parameters.replace(**{"mean_field.positions": "voxels"})
    assert voxels.resolve(2, 1, 3).kernels.distances((0.5, 1.0, 3)) == (1.0, 1.0, 1.0)
