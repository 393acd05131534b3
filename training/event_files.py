"""TensorBoard's event files: figures and texts of the log, through the package tensorboard.

    files = EventFiles("logs/run", 501, numbers, sample_name)
    files.write("train", {"step": 501, "loss": 3.2})

Used by training/logs.py, which imports it where the package is installed.
"""
import time

from tensorboard.compat.proto import event_pb2, summary_pb2, tensor_pb2, tensor_shape_pb2
from tensorboard.summary.writer.event_file_writer import EventFileWriter

TEXT = summary_pb2.SummaryMetadata(
    plugin_data=summary_pb2.SummaryMetadata.PluginData(plugin_name="text")
)


class EventFiles:
    """Event files in a folder; what an earlier run or a rewound one had written there from `step`
    on no longer counts. flat(event, values) gives the figures of an event, {name: number}, and
    sample_name(values) the name of its text.
    """

    def __init__(self, folder, step, flat, sample_name):
        self.flat = flat
        self.sample_name = sample_name
        self.writer = EventFileWriter(str(folder))
        self.begin(step)

    def begin(self, step):
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self.writer.add_event(event_pb2.Event(wall_time=time.time(), step=step, session_log=start))

    def write(self, event, values):
        if event == "rollback":
            self.begin(values["to"] + 1)
        rows = []
        for tag, value in self.flat(event, values).items():
            rows.append(summary_pb2.Summary.Value(tag=tag, simple_value=value))
        if event == "sample":
            rows.append(text(self.sample_name(values), values["prompt"] + values["text"]))
        if rows and "step" in values:
            summary = summary_pb2.Summary(value=rows)
            self.writer.add_event(
                event_pb2.Event(wall_time=time.time(), step=values["step"], summary=summary)
            )
            self.writer.flush()  # a full disk shows here

    def close(self):
        self.writer.close()


def text(tag, words):
    """A text of a summary."""
    one = tensor_shape_pb2.TensorShapeProto.Dim(size=1)
    tensor = tensor_pb2.TensorProto(
        dtype="DT_STRING",
        string_val=[words.encode()],
        tensor_shape=tensor_shape_pb2.TensorShapeProto(dim=[one]),
    )
    return summary_pb2.Summary.Value(tag=tag, metadata=TEXT, tensor=tensor)
