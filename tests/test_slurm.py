"""The same sweep on a real Slurm of one node, started in a temporary folder: finished, failed,
killed and interrupted jobs. Skipped with a reason where it cannot start."""
import ctypes, os, shutil, signal, socket, subprocess, sys, time, warnings
from pathlib import Path

import pytest

from robustnb import sweeps
from robustnb.jobs import read_row
from robustnb.sweeps import grid, sweep, sweep_rows

needed = ('munged', 'slurmctld', 'slurmd', 'sbatch', 'srun', 'squeue')
tools = os.environ['PATH'] + ':/usr/sbin:/sbin'


def _free_ports(n):
    "Ports that nobody listens on"
    held = [socket.socket() for _ in range(n)]
    for s in held:
        s.bind(('', 0))
    ports = [s.getsockname()[1] for s in held]
    for s in held:
        s.close()
    return ports


def _settings(folder):
    "A cluster of this machine alone"
    control, node = _free_ports(2)
    host = socket.gethostname().partition('.')[0]
    return f'''ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
SlurmctldPort={control}
SlurmdPort={node}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=1,batch_sched_delay=0,defer_batch
ReturnToService=2
SlurmdParameters=config_overrides
KillWait=1
InactiveLimit=0
NodeName={host} NodeAddr=127.0.0.1 CPUs=4 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
'''


def _waited(what, seconds, alive):
    "Whether `what()` came true in time"
    end = time.time() + seconds
    while time.time() < end and all(p.poll() is None for p in alive):
        if what(): return True
        time.sleep(.1)
    return False


def _answers(*command): return subprocess.run(command, capture_output=True, text=True, timeout=20)


@pytest.fixture(scope='module')
def slurm(tmp_path_factory):
    "A running Slurm; its settings are in the environment"
    pytest.importorskip('submitit',
                        reason="submitit is not installed: pip install 'robustnb[slurm]'")
    missing = [o for o in needed if not shutil.which(o, path=tools)]
    if missing:
        pytest.skip(f'no Slurm here: {", ".join(missing)} not found (Debian: apt-get install '
                    'slurmctld slurmd slurm-client munge)')
    if os.geteuid() != 0:
        pytest.skip('Slurm is started by root only')
    folder = tmp_path_factory.mktemp('slurm')
    key = folder/'munge.key'
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    for o in ('state', 'spool'):
        (folder/o).mkdir()
    (folder/'slurm.conf').write_text(_settings(folder))
    patch = pytest.MonkeyPatch()
    patch.setenv('SLURM_CONF', str(folder/'slurm.conf'))
    patch.setenv('PATH', tools)
    patch.setenv('PYTHONPATH', os.pathsep.join(o or os.getcwd() for o in sys.path))
    log = open(folder/'log', 'w')
    started = []
    # with the tests, however they end
    die_too = lambda: ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    start = lambda *command: started.append(subprocess.Popen(
        command, stdout=log, stderr=log, start_new_session=True, preexec_fn=die_too))
    try:
        start('munged', '--foreground', '--force', f'--socket={folder}/munge.socket',
              f'--key-file={key}', f'--pid-file={folder}/munged.pid',
              f'--log-file={folder}/munged.log', f'--seed-file={folder}/munged.seed')
        if not _waited((folder/'munge.socket').exists, 10, started):
            pytest.skip(f'munged did not start: {(folder/"log").read_text()[-300:]}')
        start('slurmctld', '-D')
        start('slurmd', '-D')
        if not _waited(lambda: _answers('sinfo', '-h', '-o', '%T').stdout.strip() == 'idle',
                       30, started):
            pytest.skip(f'Slurm did not start: {(folder/"log").read_text()[-600:]}')
        yield folder
    finally:
        _answers('scancel', '--user=root')
        for p in reversed(started):
            p.terminate()
            try:
                p.wait(10)
            except subprocess.TimeoutExpired:
                p.kill()
        log.close()
        patch.undo()


@pytest.fixture(scope='module')
def lab(slurm, tmp_path_factory):
    "A module of jobs, and a folder where each leaves a mark when it is called"
    folder = tmp_path_factory.mktemp('lab')
    (folder/'marks').mkdir()
    (folder/'slurm_lab.py').write_text(f"""
import math, os, time
def root(x, wait=0):
    with open(f'{folder}/marks/{{x}}', 'a') as f: f.write('*')
    if x == 5: os.kill(os.getpid(), 9)
    if x == 7 and os.path.getsize(f'{folder}/marks/7') == 1: raise OSError('the disk was away')
    time.sleep(30 if x == 25 and os.path.getsize(f'{folder}/marks/25') == 1 else wait)
    return dict(root=math.sqrt(x), task=os.environ.get('SLURM_JOB_ID', 'none'))
""")
    sys.path.insert(0, str(folder))
    import slurm_lab
    yield folder, slurm_lab.root
    sys.path.remove(str(folder))


def calls(folder, *names):
    return [len((folder/'marks'/str(k)).read_text()) if (folder/'marks'/str(k)).exists() else 0
            for k in names]


def test_jobs_come_back_from_the_cluster(lab):
    folder, root = lab
    table = grid(x=[4, -1, 7, 5, 9])
    found = sweep(root, table, folder/'out', slurm=dict(timeout_min=2, cpus_per_task=1),
                  chunk=2, tries=3)
    assert found.status.tolist() == ['done', 'failed', 'done', 'failed',
                                     'done'], found.error.tolist()
    assert found.tries[[1, 3]].tolist() == [3, 3], found.error.tolist()
    assert found.root[[0, 2, 4]].tolist() == [2, 7**.5, 3]
    assert found.task[0].isdigit()
    assert found.task[0] != found.task[2]
    assert found.tries[2] >= 2
    assert 'ValueError' in found.error[1]
    assert 'ended without a row; its last words: ' in found.error[3]
    log = Path(found.error[3].rpartition('(')[2].rstrip(')'))
    assert ('Killed' in log.read_text()
            or 'signal' in log.read_text()), 'the log that the error names says what happened'
    assert calls(folder, 4, 9) == [1, 1]
    assert all(1 < n <= 3 for n in calls(folder, -1, 7, 5))
    here = sweep(root, grid(x=[9, 4]), folder/'out', workers=1)
    assert here.root.tolist() == [3, 2], 'rows are found again, wherever they were made'
    assert calls(folder, 9, 4) == [1, 1], 'rows are found again, wherever they were made'


def test_a_killed_sweep_waits_for_its_tasks(lab):
    "kill -9 of the process that submitted: its tasks go on, and the next sweep does not submit them again"
    folder, root = lab
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', DeprecationWarning)     # of forking beside threads
        pid = os.fork()
    if not pid:
        try:
            sweep(root, grid(x=[100, 121, 144], wait=3), folder/'killed',
                  slurm=dict(timeout_min=2, cpus_per_task=1))
        finally:
            os._exit(0)
    assert _waited(lambda: (folder/'killed'/'slurm'/'tasks.json').exists()
                           and sum(calls(folder, 100, 121, 144)),
                   60, [])
    os.kill(pid, signal.SIGKILL)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
    assert not list((folder/'killed').glob('rows/*.json'))
    found = sweep(root, grid(x=[100, 121, 144, 169], wait=3), folder/'killed',
                  slurm=dict(timeout_min=2, cpus_per_task=1))
    assert found.root.tolist() == [10, 11, 12, 13]
    assert calls(folder, 100, 121, 144, 169) == [1, 1, 1, 1]
    assert len({t for t in found.task}) == 4
    assert sweep_rows(folder/'killed').status.eq('done').all()


def test_a_task_that_is_cancelled_has_another_chance(lab, monkeypatch):
    "Nothing is written and nothing is told: only the queue knows that the task is gone"
    folder, root = lab
    submit = sweeps._submit
    cancelled = []
    def then_cancel(*args):
        tasks = submit(*args)
        if not cancelled:
            cancelled.extend(tasks)
            _waited(lambda: sum(calls(folder, 25)), 20, [])
            _answers('scancel', '--signal=KILL', *tasks)
        return tasks
    monkeypatch.setattr(sweeps, '_submit', then_cancel)
    found = sweep(root, [dict(x=25), dict(x=36)], folder/'cancelled',
                  slurm=dict(timeout_min=2, cpus_per_task=1), chunk=2, tries=4)
    assert (found.status == 'done').all(), found.error.tolist()
    assert found.root.tolist() == [5, 6], found.error.tolist()
    assert found.tries[0] > 1 == found.tries[1], (
        'only the job that was running is charged with an attempt')
    assert calls(folder, 25)[0] > 1 == calls(
        folder, 36)[0], 'only the job that was running is charged with an attempt'


def test_parameters_that_slurm_does_not_know(lab):
    folder, root = lab
    for bad in (dict(memory=1), dict(slurm_color='red'), dict(timeout_min='long')):
        with pytest.raises(ValueError, match='`slurm` must hold parameters of submitit'):
            sweep(root, grid(x=1), folder/'bad', slurm=bad)
    with pytest.raises(ValueError, match='it refused the jobs: .*partition'):
        sweep(root, grid(x=1), folder/'bad', slurm=dict(timeout_min=1, slurm_partition='nowhere'))
    assert calls(folder, 1) == [0]
