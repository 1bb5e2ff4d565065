from __future__ import annotations
import os
from urllib.parse import quote, unquote_to_bytes
from types import SimpleNamespace
from ..errors import SourceError
def escape_path(s):
    return "".join(c if c!="%" and c>=" " and not 0xD800<=ord(c)<=0xDFFF else "".join("%%%02X"%b for b in os.fsencode(c)) for c in s)
def unescape_path(s): return os.fsdecode(unquote_to_bytes(s))
def list_videos(sources):
    out=[]
    for s in sources:
        root=s.split("=",1)[1]
        for h,d,f in os.walk(root):
            d.sort()
            out+=[os.path.relpath(os.path.join(h,n),root) for n in sorted(f) if n.endswith((".mp4",".avi"))]
    if not out: raise SourceError("none")
    return SimpleNamespace(paths=sorted(out))
