"""dlib's face network behind an HTTP address, as somebody else's service would be.

    pip install 'robustnb[faces]'
    python benchmarks/descriptors/serve_dlib.py --port 8000
    robustnb distill http://127.0.0.1:8000 'faces.zip[0:30]@aligned'

A request is an .npy file of uint8 images (N,150,150,3), the answer one of descriptors (N,128).
"""
import argparse, io
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np

from robustnb.core import to_float
from robustnb.descriptors.dlib_face import dlib_box


def handler(box):
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers['Content-Length']))
            answer = io.BytesIO()
            try:
                images = np.load(io.BytesIO(body), allow_pickle=False)
                np.save(answer, box(to_float(images)).numpy())
                status = 200
            except (TypeError, ValueError) as e:
                answer.write(str(e).encode())
                status = 400
            self.send_response(status)
            self.send_header('Content-Length', str(answer.tell()))
            self.end_headers()
            self.wfile.write(answer.getvalue())
        def log_message(self, *args): pass
    return Handler


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--port', type=int, default=8000)
    args = parser.parse_args()
    print(f'dlib at http://127.0.0.1:{args.port}', flush=True)
    HTTPServer(('127.0.0.1', args.port), handler(dlib_box())).serve_forever()


if __name__ == '__main__':
    main()
