"""Pictures and pages: overlays of attention maps, the confusion matrix, the HTML report."""

from attention_transfer.visualize.confusion import ClassError as ClassError
from attention_transfer.visualize.confusion import confusion_matrix as confusion_matrix
from attention_transfer.visualize.confusion import per_class_errors as per_class_errors
from attention_transfer.visualize.examples import Examples as Examples
from attention_transfer.visualize.examples import Seen as Seen
from attention_transfer.visualize.examples import attention_maps as attention_maps
from attention_transfer.visualize.examples import collect_examples as collect_examples
from attention_transfer.visualize.examples import cosine_similarity as cosine_similarity
from attention_transfer.visualize.overlays import overlay as overlay
from attention_transfer.visualize.overlays import save_maps as save_maps
from attention_transfer.visualize.report import write_report as write_report
