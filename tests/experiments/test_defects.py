"""The study of defects: they are there as stated, and the page names them."""

import json
import math

import jax
import jax.numpy as jnp
import optax
import pytest

import vsam_jax
from experiments.studies.defects import __main__ as study
from experiments.studies.defects import optax_, report

PAGE = report.RESULTS.parents[4] / 'docs' / 'evidence' / 'known_defects.md'
COMMITTED = report.load()
ZEROS = [optax_.ZERO_FIRST, optax_.ZERO_SECOND]


def _check_as_committed(findings):
    for finding in findings:
        row = COMMITTED['defects'][finding.name]
        for key in ('measured', 'right'):
            expected = pytest.approx(float(row[key]), rel=1e-3, abs=1e-6, nan_ok=True)
            assert getattr(finding, key) == expected, (finding.name, key)


def test_optax_gives_nan_after_a_zero_gradient():
    findings = {finding.name: finding for finding in optax_.findings()}
    for name in ('sam_opaque', 'sam_transparent', 'sam_transparent_second'):
        assert math.isnan(findings[name].measured)
        assert math.isfinite(findings[name].right)
    for name in ('sam_opaque_guarded', 'sam_transparent_guarded'):
        assert findings[name].measured == pytest.approx(findings[name].right)
    _check_as_committed(findings.values())


@pytest.mark.parametrize('losses', ZEROS)
def test_this_library_gives_what_is_called_right(losses):
    tx = optax.chain(vsam_jax.sam(optax_.RHO), optax.sgd(optax_.RATE))
    w = jnp.full(3, optax_.START)
    state = tx.init(w)
    for first, second in losses:
        updates, state = tx.update(
            first * w, state, w, grad_fn=lambda p, c=second: c * p
        )
        w = optax.apply_updates(w, updates)
    assert float(w[0]) == pytest.approx(optax_.right(losses))


def test_this_library_shows_a_norm_that_overflows():
    tx = vsam_jax.sam(0.05)
    g = jnp.full(4, 1e20)
    updates, _ = tx.update(g, tx.init(g), g, grad_fn=lambda p: jnp.ones(4))
    assert jnp.isnan(updates).all()


def test_steps_with_such_a_norm_can_be_skipped():
    tx = optax.chain(vsam_jax.sam(0.05), optax.apply_if_finite(optax.sgd(0.1), 3))
    g = jnp.full(4, 1e20)
    updates, _ = tx.update(g, tx.init(g), g, grad_fn=lambda p: jnp.ones(4))
    assert not updates.any()


def test_pytorch_optimizer_differs_as_stated():
    pytest.importorskip('torch')
    pytest.importorskip('pytorch_optimizer')
    from experiments.studies.defects import pytorch_optimizer_

    _check_as_committed(pytorch_optimizer_.findings())


def test_the_page_names_every_row():
    text = PAGE.read_text()
    for name in COMMITTED['defects']:
        assert f'`{name}`' in text, name


def test_the_results_are_of_the_versions_that_the_page_names():
    page = PAGE.read_text()
    for package in study.PACKAGES:
        assert f'## {package} {COMMITTED["versions"][package]}\n' in page


def test_the_command_writes_strict_json_and_a_line_for_each_number(tmp_path, capsys):
    output = tmp_path / 'defects.json'
    study.main([f'--output={output}', '--packages=optax'])
    refuse = lambda constant: pytest.fail(f'{constant} is no JSON')
    content = json.loads(output.read_text(), parse_constant=refuse)
    assert content['defects']['sam_opaque']['measured'] == 'nan'
    assert content['versions']['jax'] == jax.__version__
    assert (tmp_path / 'table.md').read_text() == report.table(content)
    assert len(capsys.readouterr().out.splitlines()) == len(content['defects'])


def test_a_package_that_is_not_installed_is_left_out(monkeypatch, capsys):
    absent = {**study.PACKAGES, 'pytorch_optimizer': ('no_such_package',)}
    monkeypatch.setattr(study, 'PACKAGES', absent)
    study.main(['--packages=pytorch_optimizer'])
    assert 'left out, no_such_package is not installed' in capsys.readouterr().out


def test_an_unknown_package_is_an_error(capsys):
    with pytest.raises(SystemExit):
        study.main(['--packages=optax,wrong'])
    assert 'wrong: not optax, pytorch_optimizer' in capsys.readouterr().err
