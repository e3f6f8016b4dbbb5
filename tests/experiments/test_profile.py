"""What is said of programs and hosts is true."""

import types

import pytest

from experiments.benchmark import host, problems, profile, programs

PROBLEM = problems.mlp(64, 8, depth=2)


def test_vsam_needs_one_tensor_more_than_the_base_optimizer():
    size = 4 * PROBLEM.num_parameters
    found = {
        title: programs.memory(programs.compiled(PROBLEM, title).executable)
        for title in ('base', 'reuse', 'reuse, PSF in bfloat16')
    }
    base = found['base']['arguments']
    # Statistics, plan and counters are small, even beside a network as small as this.
    assert found['reuse']['arguments'] - base == pytest.approx(size, abs=2000)
    halved = found['reuse, PSF in bfloat16']['arguments'] - base
    assert halved == pytest.approx(size / 2, abs=2000)
    for parts in found.values():
        assert parts['peak'] == sum(parts.values()) - parts['peak']
        # Donated: nothing of a tensor's size comes out besides.
        assert parts['outputs'] < 2000


def test_copies_of_tensors_are_counted():
    text = """
      %a = f32[4,8]{1,0} copy(%x)
      %b = bf16[4,8]{0,1} copy(f32[4,8]{1,0} %y)
      %c = f32[8]{0} copy(%z)
      %d = f32[5,5]{1,0} copy(%w)
      %e = f32[4,8]{1,0} add(%copy.1, %copy.2)
      %f = f32[3,3,2,2]{3,2,1,0} copy(%v), metadata={op_name="copy"}
    """
    shapes = [(4, 8), (8,), (3, 3, 2, 2)]
    assert programs.copies(text, shapes) == {'count': 3, 'elements': 32 + 32 + 36}


def test_what_no_interval_covers_is_idle():
    assert host.idle([(3, 4), (0, 1), (0.5, 2)]) == pytest.approx(0.25)
    assert host.idle([(0, 4), (1, 2)]) == 0
    assert host.idle([]) is None


@pytest.mark.slow
@pytest.mark.usefixtures('no_compilation_cache')
def test_a_profile_is_made_and_shown():
    tiny = problems.PROBLEMS['tiny']()
    found = profile.profile(tiny, number=1, steps=1, compilations=1)
    assert list(found['programs']) == list(programs.PROGRAMS)
    planned = found['compile_seconds']
    assert planned['planned, read'] < planned['planned']
    assert list(found['idle_shares']) == ['SGD', 'planned vSAM']
    assert all(0 <= share < 1 for share in found['idle_shares'].values())
    content = {
        'problems': {'tiny': found},
        'boundary': host.boundary(tiny, rounds=1, steps=10),
    }
    text = profile.markdown(content)
    assert all(f'| {title} |' in text for title in programs.PROGRAMS)


def test_what_waits_on_a_cpu_does_not_work():
    event = lambda name, start, end: types.SimpleNamespace(
        name=name, start_ns=start, duration_ns=end - start
    )
    events = [
        event('ThunkExecutor::Execute', 0, 1),
        event('ThunkExecutor::Execute (wait for completion)', 0, 9),
        event('convolution.3', 2, 3),  # In a loop.
        event('SlinkyThreadPool::Await', 3, 9),
    ]
    line = lambda name: types.SimpleNamespace(name=name, events=events)
    lines = [line('tf_XLAEigen/1'), line('python')]
    plane = types.SimpleNamespace(name='/host:CPU', lines=lines)
    profile = types.SimpleNamespace(planes=[plane])
    assert list(host._device_work(profile)) == [(0, 1), (2, 3)]
