// Refine each case in a process of its own, then evaluate all of them if there are labels (README.md).
nextflow.enable.dsl = 2

params.images = null
params.logits = null
params.labels = null
params.output = 'out'
params.parameters = 'default'
params.command = 'crfrefine'

process REFINE {
    tag "${case_id}"
    cpus 2
    publishDir "${params.output}/refined", mode: 'copy'

    input:
    tuple val(case_id), path(images, stageAs: 'images/*'), path(logits, stageAs: 'logits/*'), val(parameters)

    output:
    path "${case_id}.nii.gz"

    script:
    def modalities = [images].flatten().sort { it.name }.collect { "-i '${it}'" }.join(' ')
    """
    ${params.command} infer ${modalities} -p '${logits}' -o '${case_id}.nii.gz' -c '${parameters}' --threads ${task.cpus}
    """
}

process EVALUATE {
    cpus 2
    publishDir params.output, mode: 'copy'

    input:
    path refined, stageAs: 'refined/*'
    path labels, stageAs: 'labels'
    path network, stageAs: 'network'

    output:
    path 'report'

    script:
    """
    ${params.command} evaluate refined labels --baseline network=network -o report --processes ${task.cpus}
    """
}

workflow {
    if (!params.images || !params.logits) {
        error 'give --images FOLDER and --logits FOLDER'
    }
    // A file of parameters is named from the folder where the workflow was started.
    parameters = file(params.parameters).exists() ? file(params.parameters).toAbsolutePath().toString() : params.parameters
    cases = Channel
        .fromPath("${params.logits}/*.nii.gz", checkIfExists: true)
        .map { logits ->
            def case_id = logits.name - '.nii.gz'
            def several = file("${params.images}/${case_id}_[0-9][0-9][0-9][0-9].nii.gz")
            tuple(case_id, several ?: file("${params.images}/${case_id}.nii.gz", checkIfExists: true), logits, parameters)
        }
    refined = REFINE(cases)
    if (params.labels) {
        EVALUATE(refined.collect(), file(params.labels, checkIfExists: true), file(params.logits))
    }
}
