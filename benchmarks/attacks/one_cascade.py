"""One run of the cascade of whatever version of robustnb stands in a folder: a part of cascade_speed.py.

    python benchmarks/attacks/one_cascade.py VERSION CASE RESULT

CASE is a file of `torch.save`: network, weights (or None), folders where networks are found, kind and size of
the threat, images and labels. RESULT gets the images and the seconds of the processor.
"""
import sys, time

import torch


def main():
    version, case, result = sys.argv[1:]
    torch.set_num_threads(1)
    case = torch.load(case)
    sys.path[:0] = [version, *case['folders']]
    import robustnb as rn
    if case['weights']:
        model = rn.load_model(case['weights'])
    else:
        from networks import load
        model = load(case['network']).eval()
    threat = getattr(rn, case['kind'])(case['size'])
    x = case['x']
    y = case['y']
    rn.cascade(model, x[:10], y[:10], threat)
    began = time.process_time()
    x_adv = rn.cascade(model, x, y, threat)
    torch.save(dict(x_adv=x_adv, seconds=time.process_time()-began), result)


if __name__ == '__main__':
    main()
