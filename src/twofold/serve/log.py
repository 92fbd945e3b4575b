"""The log of a service: one JSON object a line."""

import json
import logging
import time


class JsonLines(logging.Formatter):
    """`time` (ISO 8601), `level`, what was said, the record's `fields`, and a traceback where there is one."""

    def format(self, record: logging.LogRecord) -> str:
        at = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(record.created))
        line = {"time": f"{at}.{record.msecs:03.0f}{time.strftime('%z', time.localtime(record.created))}"}
        line |= {"level": record.levelname.lower(), "said": record.getMessage(), **getattr(record, "fields", {})}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)
