"""One headless Chromium that opens pages at the width of a desk or of a telephone, and says what is wrong with them.

`python tools/browser.py PAGE.html ... [--width 360] [--shots FOLDER]` prints a line for each page, and with `--shots` keeps pictures.
Chromium is spoken to through a pipe in its own protocol (DevTools), so nothing needs to be installed beside it.
"""
import argparse, base64, json, os, select, shutil, subprocess, sys, tempfile, time
from pathlib import Path

NAMES = ('chromium', 'chromium-browser', 'google-chrome', 'chrome')
FLAGS = '''--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update
    --disable-sync --disable-dev-shm-usage --allow-file-access-from-files --remote-debugging-pipe'''.split()
# What a reader would notice: pictures that do not show, a page wider than the window, and which elements stick out of it
FAULTS = '''(() => {
  const images = [...document.images], missing = images.filter(i => !(i.complete && i.naturalWidth > 1)).map(i => i.getAttribute('src').slice(0, 80));
  const room = document.documentElement.clientWidth, name = e => e.tagName.toLowerCase() + (e.className ? '.' + e.className : '');
  const boxed = e => { for (e = e.parentElement; e && e !== document.body; e = e.parentElement) if (['auto', 'scroll', 'hidden'].includes(getComputedStyle(e).overflowX)) return true; return false };
  const out = [...document.body.querySelectorAll('*')].filter(e => e.getBoundingClientRect().right > room + 1 && e.getBoundingClientRect().width && !boxed(e));
  const small = [...document.querySelectorAll('main p, main li, main td, main pre')].filter(e => parseFloat(getComputedStyle(e).fontSize) < 11.5);
  return {images: images.length, missing, wide: document.documentElement.scrollWidth - room, outside: out.slice(0, 5).map(name), small: small.slice(0, 3).map(name),
          text: document.body.innerText.length}
})()'''


def find(): return next((p for o in NAMES if (p := shutil.which(o))), None)


class Browser:
    "A Chromium of our own; a context manager"
    def __init__(self, program=None, timeout=60): self.program, self.timeout, self.last, self.events, self.rest = program or find(), timeout, 0, [], b''

    def __enter__(self):
        self.home = tempfile.mkdtemp(prefix='robustnb-browser-')
        (reads, self.to), (self.back, writes) = os.pipe(), os.pipe()

        def ends():                                           # the protocol's pipe: it reads from 3 and writes to 4
            a, b = os.dup(reads), os.dup(writes)
            os.dup2(a, 3); os.dup2(b, 4)
        self.process = subprocess.Popen([self.program, *FLAGS, f'--user-data-dir={self.home}/profile', 'about:blank'], preexec_fn=ends, close_fds=False,
                                        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ | dict(HOME=self.home))
        os.close(reads); os.close(writes)
        page = next(o for o in self.ask('Target.getTargets')['targetInfos'] if o['type'] == 'page')
        self.session = self.ask('Target.attachToTarget', targetId=page['targetId'], flatten=True)['sessionId']
        for part in ('Page', 'Runtime', 'Log', 'Network'): self.ask(f'{part}.enable')
        return self

    def __exit__(self, *_):
        self.process.kill(); self.process.wait()
        os.close(self.to); os.close(self.back)
        shutil.rmtree(self.home, ignore_errors=True)

    def _read(self, until):
        while b'\0' not in self.rest:
            if not select.select([self.back], [], [], max(0, until-time.time()))[0]: raise TimeoutError(f'Chromium did not answer in {self.timeout} s')
            if not (part := os.read(self.back, 2**20)): raise ConnectionError('Chromium ended')
            self.rest += part
        said, _, self.rest = self.rest.partition(b'\0')
        return json.loads(said)

    def ask(self, method, **params):
        self.last += 1
        message = dict(id=self.last, method=method, params=params) | (dict(sessionId=self.session) if hasattr(self, 'session') else {})
        os.write(self.to, json.dumps(message).encode() + b'\0')
        until = time.time() + self.timeout
        while (said := self._read(until)).get('id') != self.last: self.events.append(said)
        if 'error' in said: raise RuntimeError(f"{method}: {said['error']['message']}")
        return said['result']

    def open(self, url, width=1280, height=900):
        "Open a page at a width in CSS pixels; a dict of what is wrong with it, see `FAULTS`, and `errors` of scripts, console and files"
        self.ask('Emulation.setDeviceMetricsOverride', width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
        self.events = []
        self.ask('Page.navigate', url=url)
        until = time.time() + self.timeout
        while not any(o.get('method') == 'Page.loadEventFired' for o in self.events): self.events.append(self._read(until))
        found = self.ask('Runtime.evaluate', expression=FAULTS, returnByValue=True)['result']['value']
        return found | dict(errors=list(filter(None, map(_complaint, self.events))))

    def shoot(self, path, whole=False):
        "A picture of the window, or of the whole page"
        size = self.ask('Page.getLayoutMetrics')['cssContentSize']
        clip = dict(x=0, y=0, width=size['width'], height=min(size['height'], 12000), scale=1) if whole else None
        data = self.ask('Page.captureScreenshot', captureBeyondViewport=whole, **(dict(clip=clip) if clip else {}))['data']
        Path(path).write_bytes(base64.b64decode(data))


def _complaint(event):
    "What a message of the browser complains about, None if it does not"
    p = event.get('params', {})
    if event.get('method') == 'Runtime.exceptionThrown': return p['exceptionDetails'].get('exception', {}).get('description') or p['exceptionDetails']['text']
    if event.get('method') == 'Log.entryAdded' and p['entry']['level'] == 'error': return p['entry']['text']
    if event.get('method') == 'Runtime.consoleAPICalled' and p['type'] in ('error', 'assert'): return str([o.get('value') for o in p['args']])
    if event.get('method') == 'Network.loadingFailed': return f"a file did not load: {p.get('errorText')}"
    return None


def faults(found):
    "The measurements of `Browser.open` that are faults, as text; empty for a good page"
    return {k: v for k, v in found.items() if k in ('missing', 'outside', 'small', 'errors') and v} | ({'wide': found['wide']} if found['wide'] > 0 else {})


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('pages', nargs='+'); p.add_argument('--width', type=int, default=1280); p.add_argument('--shots'); p.add_argument('--whole', action='store_true')
    args, bad = p.parse_args(), 0
    with Browser() as b:
        for page in args.pages:
            found = faults(b.open(Path(page).resolve().as_uri(), args.width))
            bad += bool(found)
            print(page, found or 'ok', flush=True)
            if args.shots: b.shoot(Path(args.shots)/f'{Path(page).stem}-{args.width}.png', args.whole)
    sys.exit(bool(bad))
