{{/* Labels of every object; give (dict "root" $ "component" NAME). */}}
{{- define "labels" -}}
{{ include "selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/part-of: fednnunet
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ .root.Chart.Name }}-{{ .root.Chart.Version }}
{{- end }}

{{/* What a pod is known by: the same in every version, so that an upgrade replaces no pod that did not change. */}}
{{- define "selector" -}}
app.kubernetes.io/name: {{ .root.Chart.Name }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{/* REPOSITORY:TAG, or REPOSITORY@DIGEST where a digest is given; (dict "root" $ "image" VALUES "gpu" BOOLEAN). */}}
{{- define "image" -}}
{{- with .image -}}
{{ .repository }}{{ if .digest }}@{{ .digest }}{{ else }}:{{ .tag | default (printf "%s-%s" $.root.Chart.AppVersion ($.gpu | ternary "cuda" "cpu")) }}{{ end }}
{{- end -}}
{{- end }}

{{/* PodSecurity "restricted"; 10001 is the images' user, and owns what the volumes hold. */}}
{{- define "pod.security" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
fsGroupChangePolicy: OnRootMismatch
seccompProfile:
  type: RuntimeDefault
{{- end }}

{{- define "container.security" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
runAsNonRoot: true
capabilities:
  drop: [ALL]
{{- end }}

{{/* What every pod of this chart has in common at its end. */}}
{{- define "scheduling" -}}
nodeSelector:
  {{- toYaml .Values.nodeSelector | nindent 2 }}
tolerations:
  {{- toYaml .Values.tolerations | nindent 2 }}
imagePullSecrets:
  {{- toYaml .Values.imagePullSecrets | nindent 2 }}
priorityClassName: {{ .Values.priorityClassName | quote }}
{{- end }}

{{/* The Job's name changes with what it does: a Job's template cannot be changed, another Job takes its place. */}}
{{- define "job" -}}
{{ .Release.Name | trunc 45 | trimSuffix "-" }}-{{ include "job.spec" . | sha256sum | trunc 8 }}
{{- end }}

{{/* One volume for each claim, however many folders of it are used. */}}
{{- define "volume" -}}
claim-{{ . | sha256sum | trunc 8 }}
{{- end }}

{{- define "claims" -}}
{{- $claims := dict }}
{{- range tuple .Values.input.claim .Values.output.claim .Values.model.claim .Values.options.previousStage.claim }}
{{- if . }}{{ $_ := set $claims . true }}{{ end }}
{{- end }}
{{- range $claim, $_ := $claims }}
- name: {{ include "volume" $claim }}
  persistentVolumeClaim:
    claimName: {{ $claim }}
{{- end }}
{{- end }}

{{/* Input and output, as the Job and the check have them. */}}
{{- define "folders" -}}
- name: {{ include "volume" (required "input.claim: the claim with the images" .Values.input.claim) }}
  mountPath: /input
  readOnly: true
  {{- with .Values.input.subPath }}
  subPath: {{ . | quote }}
  {{- end }}
- name: {{ include "volume" (required "output.claim: the claim for the predictions" .Values.output.claim) }}
  mountPath: /output
  {{- with .Values.output.subPath }}
  subPath: {{ . | quote }}
  {{- end }}
{{- end }}
