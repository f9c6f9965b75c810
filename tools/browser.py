"""One headless Chromium that opens pages as wide as a desk or a telephone, and finds faults.

`python tools/browser.py PAGE.html ... [--width 360] [--shots FOLDER]` prints a line for each page,
and with `--shots` keeps pictures. Chromium is spoken to through a pipe in its own protocol
(DevTools), so nothing needs to be installed beside it.
"""
import argparse, base64, json, os, select, shutil, subprocess, sys, tempfile, time
from pathlib import Path

NAMES = ('chromium', 'chromium-browser', 'google-chrome', 'chrome')
FLAGS = '''--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run
    --disable-background-networking --disable-component-update --disable-sync
    --disable-dev-shm-usage --allow-file-access-from-files --remote-debugging-pipe'''.split()
# What a reader notices: missing pictures, a page that is too wide, what sticks out, small print
FAULTS = '''(() => {
  const images = [...document.images], room = document.documentElement.clientWidth;
  const missing = images.filter(i => !(i.complete && i.naturalWidth > 1));
  const name = e => e.tagName.toLowerCase() + (e.className ? '.' + e.className : '');
  const boxes = e => ['auto', 'scroll', 'hidden'].includes(getComputedStyle(e).overflowX);
  const boxed = e => {
    while ((e = e.parentElement) && e !== document.body) if (boxes(e)) return true;
    return false;
  };
  const sticks = box => box.right > room + 1 && box.width;
  const all = [...document.body.querySelectorAll('*')];
  const outside = all.filter(e => sticks(e.getBoundingClientRect()) && !boxed(e));
  const words = [...document.querySelectorAll('main p, main li, main td, main pre')];
  const small = words.filter(e => parseFloat(getComputedStyle(e).fontSize) < 11.5);
  return {
    images: images.length, missing: missing.map(i => i.getAttribute('src').slice(0, 80)),
    wide: document.documentElement.scrollWidth - room, outside: outside.slice(0, 5).map(name),
    small: small.slice(0, 3).map(name), text: document.body.innerText.length
  };
})()'''
TIMERS = 'new Promise(done => setTimeout(done))'    # ends after the timers that were due before it


def find():
    "The path of a Chromium on this machine, None if there is none"
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    "A Chromium of our own; a context manager"

    def __init__(self, program=None, timeout=60):
        self.program = program or find()
        self.timeout = timeout
        self.last = 0
        self.events = []
        self.rest = b''

    def __enter__(self):
        self.home = tempfile.mkdtemp(prefix='robustnb-browser-')
        reads, self.to = os.pipe()
        self.back, writes = os.pipe()

        def ends():     # the protocol's pipe: it reads from 3 and writes to 4
            ours = os.dup(reads), os.dup(writes)
            os.dup2(ours[0], 3)
            os.dup2(ours[1], 4)

        command = [self.program, *FLAGS, f'--user-data-dir={self.home}/profile', 'about:blank']
        quiet = dict.fromkeys(('stdin', 'stdout', 'stderr'), subprocess.DEVNULL)
        home = os.environ | dict(HOME=self.home)
        self.process = subprocess.Popen(
            command, preexec_fn=ends, close_fds=False, env=home, **quiet)
        os.close(reads)
        os.close(writes)
        targets = self.ask('Target.getTargets')['targetInfos']
        page = next(o['targetId'] for o in targets if o['type'] == 'page')
        self.session = self.ask('Target.attachToTarget', targetId=page, flatten=True)['sessionId']
        for part in ('Page', 'Runtime', 'Log', 'Network'):
            self.ask(f'{part}.enable')
        self.ask('Page.setLifecycleEventsEnabled', enabled=True)
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        os.close(self.to)
        os.close(self.back)
        shutil.rmtree(self.home, ignore_errors=True)

    def _read(self, until):
        "The next message"
        while b'\0' not in self.rest:
            if not select.select([self.back], [], [], max(0, until-time.time()))[0]:
                raise TimeoutError(f'Chromium did not answer in {self.timeout} s')
            if not (part := os.read(self.back, 2**20)): raise ConnectionError('Chromium ended')
            self.rest += part
        said, _, self.rest = self.rest.partition(b'\0')
        return json.loads(said)

    def ask(self, method, **params):
        "Send a command and wait for its result; what is heard meanwhile goes to `events`"
        self.last += 1
        session = dict(sessionId=self.session) if hasattr(self, 'session') else {}
        message = dict(id=self.last, method=method, params=params) | session
        os.write(self.to, json.dumps(message).encode() + b'\0')
        until = time.time() + self.timeout
        while (said := self._read(until)).get('id') != self.last:
            self.events.append(said)
        if 'error' in said: raise RuntimeError(f"{method}: {said['error']['message']}")
        return said['result']

    def wait(self, arrived):
        "Read events until `arrived(events)`"
        until = time.time() + self.timeout
        while not arrived(self.events):
            self.events.append(self._read(until))

    def _go(self, url):
        "Load a page; `events` are those since"
        self.events = []
        loader = self.ask('Page.navigate', url=url)['loaderId']
        self.wait(lambda events: any(_is_load(o, loader) for o in events))

    def resize(self, width, height=900):
        "Make the window so many CSS pixels wide: a desk, or a telephone"
        self.ask('Emulation.setDeviceMetricsOverride', width=width, height=height,
                 deviceScaleFactor=1, mobile=width < 600)

    def value(self, expression):
        "What a JavaScript expression gives on the open page"
        said = self.ask('Runtime.evaluate', expression=expression, returnByValue=True)
        return said['result']['value']

    def look(self):
        "What `FAULTS` finds on the open page, and `errors` that were heard"
        return self.value(FAULTS) | dict(errors=list(filter(None, map(_complaint, self.events))))

    def open(self, url, width=1280, height=900):
        "Open a page at a width in CSS pixels, and `look` at it"
        self.resize(width, height)
        self._go('about:blank')     # what the page before still says is heard here
        self._go(url)
        self.ask('Runtime.evaluate', expression=TIMERS, awaitPromise=True)
        self.wait(lambda events: not _pending(events))      # a loaded page may still fetch
        return self.look()

    def shoot(self, path, whole=False):
        "A picture of the window, or of the whole page"
        size = self.ask('Page.getLayoutMetrics')['cssContentSize']
        clip = dict(x=0, y=0, width=size['width'], height=min(size['height'], 12000), scale=1)
        part = dict(clip=clip) if whole else {}
        data = self.ask('Page.captureScreenshot', captureBeyondViewport=whole, **part)['data']
        Path(path).write_bytes(base64.b64decode(data))


def _is_load(event, loader):
    "Whether `event` says that the page of `loader` is loaded"
    p = event.get('params', {})
    return p.get('name') == 'load' and p.get('loaderId') == loader


def _pending(events):
    "The requests that have neither arrived nor failed"
    def ids(*methods):
        return {o['params']['requestId'] for o in events if o.get('method') in methods}
    ended = ids('Network.loadingFinished', 'Network.loadingFailed')
    return ids('Network.requestWillBeSent') - ended


def _complaint(event):
    "What a message of the browser complains about, None if it does not"
    method = event.get('method')
    p = event.get('params', {})
    if method == 'Runtime.exceptionThrown':
        details = p['exceptionDetails']
        return details.get('exception', {}).get('description') or details['text']
    if method == 'Log.entryAdded' and p['entry']['level'] == 'error': return p['entry']['text']
    if method == 'Runtime.consoleAPICalled' and p['type'] in ('error', 'assert'):
        return str([o.get('value') for o in p['args']])
    if method == 'Network.loadingFailed': return f"a file did not load: {p.get('errorText')}"


def faults(found):
    "The measurements of `Browser.open` that are faults, as text; empty for a good page"
    lists = {k: found[k] for k in ('missing', 'outside', 'small', 'errors') if found[k]}
    return lists | (dict(wide=found['wide']) if found['wide'] > 0 else {})


def main(pages, width, shots, whole):
    "Open pages and print what is wrong with each; the number of bad ones"
    bad = 0
    with Browser() as b:
        for page in pages:
            found = faults(b.open(Path(page).resolve().as_uri(), width))
            bad += bool(found)
            print(page, found or 'ok', flush=True)
            if shots: b.shoot(Path(shots)/f'{Path(page).stem}-{width}.png', whole)
    return bad


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('pages', nargs='+')
    p.add_argument('--width', type=int, default=1280)
    p.add_argument('--shots')
    p.add_argument('--whole', action='store_true')
    sys.exit(main(**vars(p.parse_args())) > 0)
